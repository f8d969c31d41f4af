"""Fourier-VLM's low-pass against the sums of the cosine transform, and what it must keep."""

from __future__ import annotations

import math

import pytest
import torch

from tokred.methods.fourier_vlm import cosine_basis, low_pass


def transform(image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The lowest coefficients of image [H, W, C] in double precision, sum by sum."""
    height, width, _ = image.shape
    y = torch.zeros(rows, columns, image.shape[2], dtype=torch.float64)
    for k in range(rows):
        for m in range(columns):
            for i in range(height):
                for j in range(width):
                    wave = math.cos(math.pi * (i + 0.5) * k / height)
                    y[k, m] += wave * math.cos(math.pi * (j + 0.5) * m / width) * image[i, j]
            scale = (1 if k else 0.5) * (1 if m else 0.5)
            y[k, m] *= math.sqrt(scale * 4 / (height * width))
    return y


@pytest.mark.parametrize(("grid", "kept"), (((4, 6), (2, 3)), ((5, 3), (5, 3)), ((4, 4), (1, 1))))
def test_coefficients(grid: tuple[int, int], kept: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([transform(item.view(*grid, 3), *kept) for item in x])
    low = low_pass(x, grid, kept, inverse=False)
    torch.testing.assert_close(low, expected.flatten(1, 2).float(), rtol=1e-4, atol=1e-5)
    back = low_pass(x, grid, kept)
    again = low_pass(back, kept, kept, inverse=False)
    scale = math.sqrt(kept[0] * kept[1] / (grid[0] * grid[1]))
    torch.testing.assert_close(again, low * scale, rtol=1e-4, atol=1e-5)


def test_what_is_kept() -> None:
    x = torch.randn(2, 35, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(low_pass(x, (5, 7), (5, 7)), x, rtol=1e-4, atol=1e-5)
    flat = x[:, :1].expand(-1, 35, -1)
    torch.testing.assert_close(low_pass(flat, (5, 7), (2, 3)), flat[:, :6], rtol=1e-4, atol=1e-5)
    basis = cosine_basis(6, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64))
    assert low_pass(x.bfloat16(), (5, 7), (2, 2)).dtype == torch.bfloat16


def test_refusals() -> None:
    for kept in ((0, 1), (3, 6), (6, 2)):
        with pytest.raises(ValueError, match=r"kept must be from \(1, 1\) to \(5, 5\)"):
            low_pass(torch.zeros(1, 25, 2), (5, 5), kept)
