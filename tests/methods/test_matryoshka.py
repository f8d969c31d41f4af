"""M3's pooling against the mean of every square."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.matryoshka import pool_to


@pytest.mark.parametrize(
    ("grid", "tokens", "side"),
    [((24, 24), 576, 1), ((24, 24), 144, 2), ((24, 24), 36, 4), ((24, 24), 9, 8), ((24, 24), 1, 24),
     ((7, 10), 20, 1), ((7, 10), 17, 2)],
)  # fmt: skip
def test_means_of_squares(grid: tuple[int, int], tokens: int, side: int) -> None:
    height, width = grid
    x = torch.randn(2, height * width, 5, generator=torch.Generator().manual_seed(0))
    rows, columns = height // side, width // side
    expected = []
    for i in range(rows):
        for j in range(columns):
            cells = [
                (i * side + a) * width + j * side + b for a in range(side) for b in range(side)
            ]
            expected.append(x[:, cells].mean(1))
    torch.testing.assert_close(pool_to(x, grid, tokens), torch.stack(expected, 1))


def test_refusals() -> None:
    x = torch.zeros(1, 12, 2)
    with pytest.raises(ValueError, match=r"x must be \[B, 9, C\], the tokens of a grid of 3 x 3"):
        pool_to(x, (3, 3), 1)
    for tokens in (0, 13):
        with pytest.raises(ValueError, match=f"tokens must be from 1 to 12, got {tokens}"):
            pool_to(x, (3, 4), tokens)
    with pytest.raises(ValueError, match="squares of 3 x 3, which 1 tokens need, are larger"):
        pool_to(x, (1, 12), 1)
