"""TokenFLEX's pooling against the mean of every cell of an even division."""

from __future__ import annotations

import math

import pytest
import torch

from tokred.methods.tokenflex import pool_to


@pytest.mark.parametrize(("grid", "side"), (((24, 24), 8), ((7, 10), 3), ((5, 4), 1), ((4, 4), 6)))
def test_means_of_cells(grid: tuple[int, int], side: int) -> None:
    height, width = grid
    x = torch.randn(2, height * width, 5, generator=torch.Generator().manual_seed(0))
    image = x.view(2, height, width, 5)

    def cell(i: int, length: int) -> slice:
        return slice(i * length // side, math.ceil((i + 1) * length / side))

    expected = [
        image[:, cell(i, height), cell(j, width)].mean((1, 2))
        for i in range(side)
        for j in range(side)
    ]
    torch.testing.assert_close(pool_to(x, grid, side * side), torch.stack(expected, 1))


def test_refusals() -> None:
    for tokens in (0, -4, 8):
        with pytest.raises(ValueError, match=f"tokens must be a square number .* got {tokens}"):
            pool_to(torch.zeros(1, 9, 2), (3, 3), tokens)
    with pytest.raises(ValueError, match=r"got \[1, 9, 2\]"):
        pool_to(torch.zeros(1, 9, 2), (3, 4), 4)
