"""LRS-VQA: read the tiles of a large image that the text attends to, then prune their tokens.

When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine Text-Guided
Token Pruning (arXiv 2503.07588).

The module whose attention ranks tokens is distilled from layers of the language model; its queries
and keys are arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._budgets import keep_count
from ._grids import check_grid
from ._lists import check_minimum
from ._method import Family, Method, Needs
from ._picks import best, mask_of
from ._thresholds import percentile


def text_attention(q: Tensor, k: Tensor, vision: slice, scale: float | None = None) -> Tensor:
    """What the last token of the text attends to: f32 [B, V], the mean of the heads.

    Args:
        q: [B, H, 1, D], its query. k: [B, Hkv, N, D], all keys; vision: those of visual tokens.
    """
    return tokred.attention_rows(q, k, scale=scale).mean(1)[:, 0, vision]


def above(scores: Tensor, threshold: float = 0.2, valid: Tensor | None = None) -> Tensor:
    """The tokens above a threshold between the 5th and the 95th percentile of their row.

    Args:
        scores: f32 [B, N]. threshold: of (s - p5) / (p95 - p5), in [0, 1]. valid: bool [B, N].

    Returns:
        bool [B, N]; none where the percentiles are equal.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    low, high = percentile(scores, 5, valid), percentile(scores, 95, valid)
    spread = high - low
    unit = ((scores.float() - low) / torch.where(spread > 0, spread, 1.0)).clamp(0, 1)
    chosen = (unit > threshold) & (spread > 0)
    return chosen if valid is None else chosen & valid


def pruned(
    scores: Tensor,
    ratio: float = 0.25,
    valid: Tensor | None = None,
    newline: Tensor | None = None,
) -> Tensor:
    """The tokens that the language model reads: int(ratio V) of V valid ones, and all ends of rows.

    Args:
        scores: f32 [B, N]. valid: bool [B, N], those that may be chosen by score, all where None.
        newline: bool [B, N], tokens that end a row of the image, which stay beside the budget.

    Returns:
        bool [B, N].

    Raises:
        ValueError: a ratio outside [0, 1].
    """
    keep_count(0, ratio=ratio)
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    budget = (valid.sum(1).double() * ratio + 1e-9).floor().long()
    chosen = mask_of(best(scores, budget, valid), scores.shape[1])
    return chosen if newline is None else chosen | newline


def tiles_of(selected: Tensor, grid: tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """The tiles of the next, finer level in which a chosen token lies.

    Args:
        selected: bool [B, H * W], without ends of rows. grid: (H, W).
        tiles: (rows, columns) of the next level; token (r, c) lies in tile
            (r * rows // H, c * columns // W).

    Returns:
        bool [B, rows * columns].
    """
    check_grid(selected.shape[1], grid)
    check_minimum(1, tiles=min(tiles))
    rows, columns = (
        torch.arange(size, device=selected.device) * count // size
        for size, count in zip(grid, tiles, strict=True)
    )
    tile = (rows[:, None] * tiles[1] + columns).flatten().expand_as(selected)
    hit = torch.zeros(
        selected.shape[0], tiles[0] * tiles[1], dtype=torch.int32, device=selected.device
    )
    return hit.scatter_reduce(1, tile, selected.int(), "amax") > 0


METHOD = Method(
    title=(
        "When Large Vision-Language Model Meets Large Remote Sensing Imagery: Coarse-to-Fine "
        "Text-Guided Token Pruning"
    ),
    arxiv="2503.07588",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="read the tiles of a large image that the text attends to, then prune their tokens",
)
