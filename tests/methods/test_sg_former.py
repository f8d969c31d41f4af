"""SG-Former's significance against whole attention matrices, and its three rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.methods.sg_former import RATES, column_major, reallocate, significance


@pytest.mark.parametrize(("grid", "coarse", "window"), [((8, 4), (4, 2), 4), ((6, 6), (2, 2), 3)])
def test_significance(grid: tuple[int, int], coarse: tuple[int, int], window: int) -> None:
    tokens, cells = grid[0] * grid[1], coarse[0] * coarse[1]
    q1, q2, k2 = torch.randn(3, 2, 3, tokens, 8)
    k1 = torch.randn(2, 3, cells, 8)
    given = significance((q1, k1), (q2, k2), grid, coarse, window)
    scale = 8**-0.5
    whole = (q1.double() @ k1.double().mT * scale).softmax(-1).mean((1, 2))
    for i in range(tokens):
        y, x = divmod(i, grid[1])
        cell = (y * coarse[0] // grid[0]) * coarse[1] + x * coarse[1] // grid[1]
        inside = [
            j for j in range(tokens)
            if j // grid[1] // window == y // window and j % grid[1] // window == x // window
        ]  # fmt: skip
        local = (q2[:, :, inside].double() @ k2[:, :, inside].double().mT * scale).softmax(-1)
        expected = whole[:, cell] + local.mean((1, 2))[:, inside.index(i)]
        torch.testing.assert_close(given[:, i].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rates(dtype: torch.dtype) -> None:
    """Tokens that become one: four in the first quarter, two in the middle half, else one."""
    rates = ((0.25, 4), (0.5, 2), (0.25, 1))
    linear = [nn.Linear(f, 1).to(dtype) for _, f in rates]
    weights = [(layer.weight, layer.bias) for layer in linear]
    x = torch.randn(2, 32, 5).to(dtype)
    scores = torch.rand(2, 32, generator=torch.Generator().manual_seed(0))
    scores[1, 4:20] = 0.5  # ties keep their order
    given = reallocate(x, scores, weights, rates)
    assert given.shape == (2, 2 + 8 + 8, 5)
    for item in range(2):
        order = sorted(range(32), key=lambda i: (scores[item, i].item(), i))
        expected, start = [], 0
        for (share, f), layer in zip(rates, linear, strict=True):
            for first in range(start, start + int(32 * share), f):
                rows = x[item, order[first : first + f]].float()
                one = (rows * layer.weight[0].float()[:, None]).sum(0) + layer.bias.float()
                expected.append(one)
            start += int(32 * share)
        torch.testing.assert_close(given[item].float(), torch.stack(expected), rtol=2e-2, atol=2e-2)
    given.float().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in linear)
    assert torch.equal(reallocate(x[1:], scores[1:], weights, rates)[0], given[1])


def test_published_rates() -> None:
    """At 224 pixels: 56 x 56 tokens, 28 x 28 and 14 x 14."""
    for reduction, tokens, left in ((8, 3136, 4 + 28 + 28), (4, 784, 4 + 28 + 28), (2, 196, 147)):
        rates = RATES[reduction]
        weights = [(torch.ones(1, f), None) for _, f in rates]
        out = reallocate(torch.ones(1, tokens, 2), torch.rand(1, tokens), weights, rates)
        assert out.shape == (1, left, 2)


def test_columns_and_refusals() -> None:
    x = torch.arange(6).view(1, 6, 1)
    assert column_major(x, (2, 3))[0, :, 0].tolist() == [0, 3, 1, 4, 2, 5]
    weights = [(torch.ones(1, f), None) for _, f in RATES[4]]
    with pytest.raises(ValueError, match=r"0\.25 of 100 tokens must be a multiple of 49"):
        reallocate(torch.zeros(1, 100, 2), torch.rand(1, 100), weights)
    with pytest.raises(ValueError, match="weights must have one for each of 3 parts, got 2"):
        reallocate(torch.zeros(1, 784, 2), torch.rand(1, 784), weights[:2])
    q, k = torch.zeros(1, 1, 36, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="grid must be divided by window = 4, got 6 x 6"):
        significance((q, k), (q, q), (6, 6), (2, 2), 4)
