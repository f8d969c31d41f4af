"""QuoTA: every frame of a video gets tokens in proportion to the square of its relevance.

QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension (arXiv
2503.08689).

The relevance, which another vision-language model says of each frame, is an argument. What a cap
cuts off goes to the other frames until all of it is given out; reference_compat=True does so once
and loses what the cap then cuts off again, as the authors' code does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ._budgets import allocate
from ._grids import as_image, as_tokens
from ._lists import check_minimum
from ._method import Family, Method, Needs
from ._picks import spaced_picks


def frame_budgets(
    relevance: Tensor, total: int = 64 * 196, cap: int | None = None, reference_compat: bool = False
) -> Tensor:
    """The tokens of every frame: int(total * w), w being the share of relevance squared.

    Args:
        relevance: f32 [B, F], probabilities. total: tokens of the video.
        cap: the most that a frame gets, its number of tokens.

    Returns:
        i32 [B, F]; frames with 0 are left out.
    """
    check_minimum(0, total=total)
    weight = (100 * relevance.double()).square()
    if cap is None or not reference_compat:
        return allocate(weight, total, cap, redistribute=cap is not None)
    share, limit = weight / weight.sum(1, keepdim=True), cap / total
    share = share.clamp(max=limit)
    share = (share / share.sum(1, keepdim=True)).clamp(max=limit)
    return (share * total).floor().to(torch.int32)


def frame_grid(count: int) -> tuple[int, int]:
    """(height, width) of at most `count` tokens: floor(sqrt), and one more column where they fit.

    Raises:
        ValueError: count is below 1.
    """
    check_minimum(1, count=count)
    side = math.isqrt(count)
    return (side, side + 1) if side * (side + 1) <= count else (side, side)


def resize_frame(x: Tensor, grid: tuple[int, int], count: int, mode: str = "bilinear") -> Tensor:
    """The tokens of a frame on the grid of `count` tokens.

    Args:
        x: [B, H * W, C]. grid: (H, W). mode: "bilinear", the default of the authors' code, or
            "average" (its second version), which pools.

    Returns:
        [B, H' * W', C] of frame_grid(count).
    """
    size = frame_grid(count)
    image = as_image(x, grid)
    if mode == "average":
        return as_tokens(functional.adaptive_avg_pool2d(image, size))
    if mode != "bilinear":
        raise ValueError(f'mode must be "bilinear" or "average", got {mode!r}')
    return as_tokens(functional.interpolate(image, size, mode="bilinear", align_corners=False))


def spaced_tokens(budgets: Tensor, tokens: int) -> Tensor:
    """The evenly spaced tokens of every frame, which the third version of the code keeps.

    Args:
        budgets: i32 [B, F]. tokens: N, of a frame.

    Returns:
        bool [B, F, N].
    """
    rank = torch.arange(tokens, device=budgets.device)
    count = torch.full_like(rank, tokens)
    return spaced_picks(rank, count, budgets[..., None].clamp(max=tokens))


METHOD = Method(
    title=(
        "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension"
    ),
    arxiv="2503.08689",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="frames get tokens in proportion to their squared relevance to the question",
)
