"""QuoTA's budgets, grids and picks, frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tokred.methods.quota import frame_budgets, frame_grid, resize_frame, spaced_tokens


@pytest.mark.parametrize("frames", [1, 5, 32])
def test_budgets(frames: int) -> None:
    relevance = torch.rand(3, frames, generator=torch.Generator().manual_seed(frames))
    for total in (0, 64, 12544):
        given = frame_budgets(relevance, total)
        for item in range(3):
            weights = [(100 * p) ** 2 for p in relevance[item].double().tolist()]
            assert given[item].tolist() == [int(total * w / sum(weights)) for w in weights]
        assert torch.equal(frame_budgets(relevance[1:2], total)[0], given[1])


def test_caps() -> None:
    """Five frames of which one is worth half: shares .5, .3, .1, .05, .05, at most .25 each."""
    relevance = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05]]).sqrt() / 100
    for given, expected in (
        (frame_budgets(relevance, 1000, 250), [250, 250, 250, 125, 125]),
        (frame_budgets(relevance, 1000, 250, reference_compat=True), [250, 250, 142, 71, 71]),
    ):  # up to a share that rounding takes below its whole number
        assert ((given[0] - torch.tensor(expected)).abs() <= 1).all(), given
    even = frame_budgets(torch.ones(1, 4), 100, 10)
    assert even.tolist() == [[10] * 4]
    zero = frame_budgets(torch.zeros(1, 4), 100)
    assert zero.tolist() == [[25] * 4]


def test_grids() -> None:
    for count in range(1, 200):
        side = math.isqrt(count)
        height, width = frame_grid(count)
        assert (height, width) in ((side, side), (side, side + 1)) and height * width <= count
        assert height * (width + 1) > count or width == side + 1
    x = torch.randn(2, 12, 4)
    image = x.transpose(1, 2).unflatten(2, (3, 4))
    for mode, expected in (
        ("bilinear", functional.interpolate(image, (2, 3), mode="bilinear")),
        ("average", functional.adaptive_avg_pool2d(image, (2, 3))),
    ):
        given = resize_frame(x, (3, 4), 7, mode)
        torch.testing.assert_close(given, expected.flatten(2).transpose(1, 2))


def test_spaced_tokens() -> None:
    budgets = torch.tensor([[0, 1, 5], [9, 12, 3]], dtype=torch.int32)
    given = spaced_tokens(budgets, 9)
    for item in range(2):
        for frame in range(3):
            n = min(int(budgets[item, frame]), 9)
            expected = [i * 8 // (n - 1) if n > 1 else 0 for i in range(n)]
            assert given[item, frame].nonzero()[:, 0].tolist() == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="total must be at least 0, got -1"):
        frame_budgets(torch.rand(1, 3), -1)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        frame_grid(0)
    with pytest.raises(ValueError, match='mode must be "bilinear" or "average"'):
        resize_frame(torch.zeros(1, 4, 2), (2, 2), 3, "nearest")
    with pytest.raises(ValueError, match="the tokens of a grid of 2 x 3"):
        resize_frame(torch.zeros(1, 4, 2), (2, 3), 3)
