"""M3: average-pool the grid of an image's tokens to one of several nested sizes.

Matryoshka Multimodal Models (arXiv 2405.17430).

The pooling; the language model is trained with all sizes, of which any can then be chosen.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from ._grids import as_image, as_tokens
from ._method import Family, Method, Needs


def pool_to(x: Tensor, grid: tuple[int, int], tokens: int) -> Tensor:
    """Pools to about `tokens` tokens; 576, 144, 36, 9 and 1 of 24 x 24 are the published sizes.

    The side of the squares is int(sqrt(H W / tokens)); rows and columns beyond the last whole
    square are left out, as published.

    Args:
        x: [B, H * W, C], row by row, without a class token. grid: (H, W).
        tokens: from 1 to H W.

    Returns:
        [B, (H // side) * (W // side), C]. Differentiable.

    Raises:
        ValueError: x is no such grid, tokens are out of range, or the squares are larger than it.
    """
    image, (height, width) = as_image(x, grid), grid
    if not 1 <= tokens <= height * width:
        raise ValueError(f"tokens must be from 1 to {height * width}, got {tokens}")
    side = int(math.sqrt(height * width / tokens))
    if side > min(grid):
        raise ValueError(
            f"squares of {side} x {side}, which {tokens} tokens need, are larger than the grid of "
            f"{height} x {width}"
        )
    return as_tokens(functional.avg_pool2d(image, side))


METHOD = Method(
    title="Matryoshka Multimodal Models",
    arxiv="2405.17430",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="average-pool the tokens of an image to one of several nested grids",
)
