"""TS-LLaVA: a thumbnail of some frames, and tokens sampled evenly from all frames.

TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for Training-Free Video Large
Language Models (arXiv 2411.11066).

The thumbnail is encoded as an image of its own; its tokens come before the sampled ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._lists import check_count
from ._maps import identity
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video


def even_positions(total: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """round(linspace(0, total - 1, count)): i64 [count], ascending.

    Raises:
        ValueError: count is not from 1 to total, beyond which positions would repeat.
    """
    check_count("count", count, minimum=None)
    if not 1 <= count <= total:
        raise ValueError(f"count must be from 1 to {total}, got {count}")
    return torch.linspace(0, total - 1, count, dtype=torch.float64, device=device).round().long()


def sample_tokens(x: Tensor, count: int = 1728) -> VideoTokens:
    """`count` tokens at even distances in the row of all frames; the others are dropped.

    Args:
        x: [B, F, N, C].

    Returns:
        VideoTokens with tokens [B, count, C].

    Raises:
        ValueError: x is no video, or count is not from 1 to F N.
    """
    batch, frames, tokens, _ = check_video(x)
    positions = even_positions(frames * tokens, count, x.device)
    kept = x.flatten(1, 2)[:, positions]
    slots = torch.full((batch, frames * tokens), -1, dtype=torch.int32, device=x.device)
    slots[:, positions] = identity(kept)
    return VideoTokens(kept, slots)


def thumbnail(frames: Tensor, rows: int, columns: int) -> Tensor:
    """One image of rows x columns frames, row by row, of the size of a frame.

    Args:
        frames: [B, F, 3, H, W], of which rows * columns at even distances are taken and shrunk;
            rows must divide H, columns W.

    Returns:
        [B, 3, H, W].

    Raises:
        ValueError: too few frames, or sizes that do not divide.
    """
    if frames.dim() != 5:
        raise ValueError(f"frames must be [B, F, 3, H, W], got {list(frames.shape)}")
    batch, count, channels, height, width = frames.shape
    if min(rows, columns) < 1 or height % rows or width % columns:
        raise ValueError(
            f"rows and columns must divide frames of {height} x {width}, got {rows} and {columns}"
        )
    chosen = frames[:, even_positions(count, rows * columns, frames.device)].flatten(0, 1)
    cell = (height // rows, width // columns)
    small = functional.interpolate(chosen, cell, mode="bilinear", antialias=True)
    grid = small.view(batch, rows, columns, channels, *cell)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


METHOD = Method(
    title=(
        "TS-LLaVA: Constructing Visual Tokens through Thumbnail-and-Sampling for Training-Free "
        "Video Large Language Models"
    ),
    arxiv="2411.11066",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="tokens sampled evenly from all frames, behind those of a thumbnail of some",
)
