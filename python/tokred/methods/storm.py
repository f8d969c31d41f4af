"""STORM: after a temporal encoder, pool a video's tokens over time and space, or sample frames.

Token-Efficient Long Video Understanding for Multimodal LLMs (arXiv 2503.04130).

An approximate version, after the abstract: the three ways to reduce, without the learned Mamba
encoder that carries information between the frames before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._grids import as_image, as_tokens
from ._lists import check_minimum
from ._maps import identity
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video


def pool_frames(x: Tensor, every: int) -> VideoTokens:
    """The mean of every `every` consecutive frames, token by token; the last may be of fewer.

    Args:
        x: [B, F, N, C].

    Returns:
        VideoTokens with tokens [B, ceil(F / every) * N, C]. Differentiable.
    """
    check_minimum(1, every=every)
    batch, frames, tokens, _ = check_video(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = [part.to(wide).mean(1) for part in x.split(every, 1)]
    pooled = torch.cat(groups, 1) if groups else x.flatten(1, 2)
    clip = torch.arange(frames, dtype=torch.int32, device=x.device)[:, None] // every * tokens
    token_map = (clip + torch.arange(tokens, dtype=torch.int32, device=x.device)).view(1, -1)
    return VideoTokens(pooled.to(x.dtype), token_map.repeat(batch, 1))


def pool_space(x: Tensor, grid: tuple[int, int], side: int = 2) -> VideoTokens:
    """The mean of every side x side square of every frame.

    Args:
        x: [B, F, H * W, C], row by row. grid: (H, W), multiples of side.

    Returns:
        VideoTokens with tokens [B, F * N / side^2, C]. Differentiable.

    Raises:
        ValueError: x is no such video, or side does not divide the grid.
    """
    check_minimum(1, side=side)
    batch, frames, _, _ = check_video(x)
    (height, width), rows = grid, x.flatten(0, 1)
    if height % side or width % side:
        raise ValueError(f"side must divide the grid of {height} x {width}, got {side}")
    pooled = as_tokens(functional.avg_pool2d(as_image(rows, grid), side))
    y = torch.arange(height, dtype=torch.int32, device=x.device) // side
    cell = y[:, None] * (width // side) + torch.arange(width, device=x.device) // side
    first = torch.arange(frames, device=x.device) * pooled.shape[1]
    token_map = (first[:, None] + cell.flatten()).to(torch.int32).view(1, -1)
    return VideoTokens(pooled.reshape(batch, -1, x.shape[3]), token_map.repeat(batch, 1))


def sample_frames(x: Tensor, every: int) -> VideoTokens:
    """Every `every`-th frame, from the first on; the others are dropped.

    Args:
        x: [B, F, N, C].

    Returns:
        VideoTokens with tokens [B, ceil(F / every) * N, C].
    """
    check_minimum(1, every=every)
    check_video(x)
    kept = x[:, ::every].flatten(1, 2)
    slots = torch.full(x.shape[:3], -1, dtype=torch.int32, device=x.device)
    slots[:, ::every] = identity(kept).view(slots[:, ::every].shape)
    return VideoTokens(kept, slots.flatten(1))


METHOD = Method(
    title="Token-Efficient Long Video Understanding for Multimodal LLMs",
    arxiv="2503.04130",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="pool a video's tokens over time and space, or sample frames, after a temporal encoder",
)
