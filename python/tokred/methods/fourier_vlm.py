"""Fourier-VLM: keep the low frequencies of the grid of an image's tokens.

Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language Models
(arXiv 2508.06038).

An approximate version, after the abstract: the two-dimensional cosine transform is two products
with small matrices in place of fast Fourier transforms, and the low frequencies are transformed
back on the smaller grid, scaled so that a constant image stays what it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._grids import as_image, as_tokens
from ._method import Family, Method, Needs


def cosine_basis(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II: row k is sqrt(2 / n) cos(pi (i + 1/2) k / n), row 0 sqrt(1 / n)."""
    place = torch.arange(length, dtype=torch.float64, device=device)
    basis = (math.pi / length * (place + 0.5) * place[:, None]).cos() * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis.to(dtype)


def low_pass(
    x: Tensor, grid: tuple[int, int], kept: tuple[int, int], inverse: bool = True
) -> Tensor:
    """The kept[0] x kept[1] lowest frequencies of a grid of tokens.

    Args:
        x: [B, H * W, C], row by row, without a class token. grid: (H, W).
        kept: (h, w), from (1, 1) to (H, W), which is the grid itself.
        inverse: transform back on the grid of h x w; else return the coefficients.

    Returns:
        [B, h * w, C] in the dtype of x, computed in float32 at least. Differentiable.

    Raises:
        ValueError: x is no such grid, or kept is out of range.

    Complexity: O(B C h W (H + w)).
    """
    image, (height, width), (rows, columns) = as_image(x, grid), grid, kept
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"kept must be from (1, 1) to {tuple(grid)}, got {tuple(kept)}")
    wide = torch.promote_types(x.dtype, torch.float32)

    def basis(length: int) -> Tensor:
        return cosine_basis(length, wide, x.device)

    low = basis(height)[:rows] @ image.to(wide) @ basis(width)[:columns].T
    if inverse:
        scale = math.sqrt(rows * columns / (height * width))
        low = basis(rows).T @ low @ basis(columns) * scale
    return as_tokens(low).to(x.dtype)


METHOD = Method(
    title=(
        "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language "
        "Models"
    ),
    arxiv="2508.06038",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="keep the low spatial frequencies of an image's tokens",
)
