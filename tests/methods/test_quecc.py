"""QueCC's local pooling against torch's own attention, region by region."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokred.methods.quecc import QueccWeights, local_pool


def layers(channels: int, kernel: int, heads: int, bias: bool, seed: int = 0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, channels, kernel, kernel, groups=channels, bias=bias)
    attention = nn.MultiheadAttention(channels, heads, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    weights = QueccWeights(
        conv.weight, attention.in_proj_weight, attention.out_proj.weight,
        conv.bias, attention.in_proj_bias, attention.out_proj.bias, heads,
    )  # fmt: skip
    return conv, attention, weights


@pytest.mark.parametrize(("grid", "kernel"), [((8, 8), 4), ((4, 4), 4), ((6, 4), 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_regions(grid: tuple[int, int], kernel: int, bias: bool) -> None:
    conv, attention, weights = layers(16, kernel, 2, bias)
    q, k, v = torch.randn(3, 2, grid[0] * grid[1], 16)
    given = local_pool(q, k, v, weights, grid)
    rows, columns = grid[0] // kernel, grid[1] // kernel
    small = conv(q.transpose(1, 2).unflatten(2, grid))
    for r in range(rows):
        for c in range(columns):
            inside = [
                y * grid[1] + x
                for y in range(r * kernel, (r + 1) * kernel)
                for x in range(c * kernel, (c + 1) * kernel)
            ]
            one = attention(small[:, :, r, c][:, None], k[:, inside], v[:, inside])[0][:, 0]
            torch.testing.assert_close(given[:, r * columns + c], one, rtol=1e-4, atol=1e-5)
    alone = local_pool(q[1:], k[1:], v[1:], weights, grid)
    torch.testing.assert_close(alone[0], given[1])


def test_gradients_and_half_precision() -> None:
    _, _, weights = layers(16, 4, 2, True)
    q, k, v = torch.randn(3, 1, 64, 16).requires_grad_().unbind(0)
    out = local_pool(q, k, v, weights, (8, 8))
    out.square().sum().backward()
    for tensor in (weights.conv, weights.into, weights.out):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    half = QueccWeights(
        *(getattr(weights, n).detach().bfloat16() for n in
          ("conv", "into", "out", "conv_bias", "into_bias", "out_bias")), weights.heads,
    )  # fmt: skip
    low = local_pool(*(x.detach().bfloat16() for x in (q, k, v)), half, (8, 8))
    torch.testing.assert_close(low.float(), out.detach(), rtol=5e-2, atol=5e-2)


def test_refusals() -> None:
    x = torch.randn(1, 36, 16)
    for kernel, heads, grid, words in (
        (4, 3, (6, 6), "heads must divide the 16 channels, got 3"),
        (8, 2, (6, 6), "conv must be no larger than the grid"),
        (2, 2, (6, 5), "the tokens of a grid of 6 x 5"),
    ):
        _, _, weights = layers(16, kernel, heads if 16 % heads == 0 else 1, True)
        weights = QueccWeights(weights.conv, weights.into, weights.out, heads=heads)
        with pytest.raises(ValueError, match=words):
            local_pool(x, x, x, weights, grid)
    _, _, weights = layers(16, 3, 2, True)
    with pytest.raises(ValueError, match="grid must be divided by the 4 x 4 regions"):
        local_pool(x, x, x, weights, (6, 6), stride=1)
