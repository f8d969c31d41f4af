"""EfficientVLA: key tokens of the task, more of them, and tokens unlike these; layers left out.

EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models (arXiv
2506.10100).

An approximate version of the language module's part: the attention between a visual token and the
context is that of the context's queries on its key, which a causal model has; the compression of
the MLPs is another paper's and left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._arguments import features_of
from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs
from ._picks import best, in_order, mask_of, rows_of


def task_scores(q: Tensor, k: Tensor, vision: slice, scale: float | None = None) -> Tensor:
    """How much the task's context attends to every visual token.

    Args:
        q: [B, H, T, D], the last T queries. k: [B, Hkv, N, D]; vision: the keys of visual tokens.

    Returns:
        f32 [B, V], the sum over the context of the mean over the heads.
    """
    return tokred.attention_columns(q, k, causal=True, scale=scale).mean(1)[:, vision]


def select(
    x: Tensor,
    scores: Tensor,
    keep: int = 56,
    num_key: int = 4,
    alpha: float = 0.5,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """The visual tokens that stay.

    The num_key tokens of the highest score are the key set; of the keep - num_key others,
    int(alpha * that) follow by score, the rest are those least similar to the key set.

    Args:
        x: [B, N, C], on which cosine similarity is measured. scores: f32 [B, N], task_scores.
        valid: bool [B, N], False is never kept.
        order: "position", or "score": the key set, those by score, then the least similar first.

    Returns:
        i32 [B, min(keep, N)], -1 behind the last.

    Raises:
        ValueError: num_key is not from 1 to keep, or alpha not in [0, 1].

    O(B N num_key C) time.
    """
    check_count("keep", keep)
    if not 1 <= num_key <= keep:
        raise ValueError(f"num_key must be from 1 to keep = {keep}, got {num_key}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    tokens = x.shape[1]
    keep = min(keep, tokens)
    num_key = min(num_key, keep)
    by_score = num_key + int(alpha * (keep - num_key))
    first = best(scores, by_score, valid, "score")
    key = first[:, :num_key].contiguous()
    taken = mask_of(first, tokens)
    rows = features_of(x)
    similarity, _ = tokred.match(rows, rows_of(rows, key), mask_b=(key >= 0).contiguous())
    may = ~taken & ~scores.isnan() if valid is None else ~taken & ~scores.isnan() & valid
    smallest = best(-similarity, keep - by_score, may, "score")
    return in_order(torch.cat([first, smallest], 1), order)


def layer_importance(before: Tensor, after: Tensor, valid: Tensor | None = None) -> Tensor:
    """How much a layer changes its tokens: f32 [], 1 - the mean cosine of what enters and leaves.

    Args:
        before, after: [B, N, C], of a calibration set. valid: bool [B, N].
    """
    _, cosine = tokred.transition_stats(features_of(before), features_of(after))
    if valid is None:
        return 1 - cosine.mean()
    return 1 - torch.where(valid, cosine, 0.0).sum() / valid.sum().clamp(min=1)


def layers_to_drop(importance: Tensor, count: int) -> list[int]:
    """The `count` layers of lowest importance f32 [L], ascending; the lower one on a tie."""
    check_minimum(0, count=count)
    ranked = sorted(range(len(importance)), key=importance.tolist().__getitem__)
    return sorted(ranked[:count])


def computed_steps(steps: int, interval: int = 5) -> list[int]:
    """The denoising steps, of steps, steps - 1, ... 1, whose attention and MLP the action head
    computes: the first one and the multiples of the interval. Others take those of the last one.
    """
    check_minimum(1, steps=steps, interval=interval)
    return [step for step in range(steps, 0, -1) if step == steps or step % interval == 0]


METHOD = Method(
    title=(
        "EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models"
    ),
    arxiv="2506.10100",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="a few key tokens of the task, more by score, the rest unlike the key ones",
)
