"""TokenFLEX: pool an image's tokens to as many as a task needs, evenly whatever the grid.

TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference (arXiv 2504.03154).

An approximate version, after the abstract: the adaptive pooling to 64, 144 or 256 tokens without
the learned projector (SwiGLU) behind it.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from ._grids import as_image, as_tokens
from ._method import Family, Method, Needs


def pool_to(x: Tensor, grid: tuple[int, int], tokens: int) -> Tensor:
    """Adaptive average pooling to a square of sqrt(tokens) x sqrt(tokens).

    Args:
        x: [B, H * W, C], row by row, without a class token. grid: (H, W).
        tokens: a square number, such as 64, 144 or 256.

    Returns:
        [B, tokens, C]. Differentiable.

    Raises:
        ValueError: x is no such grid, or tokens is no square number.
    """
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        raise ValueError(f"tokens must be a square number such as 64, 144 or 256, got {tokens}")
    return as_tokens(functional.adaptive_avg_pool2d(as_image(x, grid), side))


METHOD = Method(
    title="TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference",
    arxiv="2504.03154",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="pool the tokens of an image to any square number, evenly",
)
