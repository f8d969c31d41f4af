"""ATP-LLaVA: keep visual tokens above a threshold of attention, or on a sparse grid of the image.

ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models (arXiv 2412.00447).

The thresholds are learned, for every image and prompt: they are arguments, or what the learned
linear layers that are arguments of `thresholds` make of the scores. An approximate version: the
scores of a grid's samples follow a description of the method; that the coarsest of several grids
counts is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._arguments import check_order
from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs
from ._prompts import attention_from


def self_scores(
    q: Tensor, k: Tensor, scale: float | None = None, valid: Tensor | None = None
) -> Tensor:
    """The logit that every visual token gets from all of them, mean over heads and queries.

    Args:
        q: [B, Hq, N, D], k: [B, Hkv, N, D], of the visual tokens. scale: 1 / sqrt(D) where None.
        valid: bool [B, N]; padding is no query and gets 0.

    Returns:
        f32 [B, N]. The mean of logits is the logit of the mean query, so this is O(N D) a head.
    """
    q, k = q.detach(), k.detach()
    if valid is None:
        mean = q.float().mean(2, keepdim=True)
    else:
        weight = valid[:, None, :, None].float()
        mean = (q.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    logits = tokred.attention_rows(mean, k.float(), softmax=False, scale=scale)[:, :, 0].mean(1)
    return logits if valid is None else logits.masked_fill(~valid, 0)


def cross_scores(
    q: Tensor, k: Tensor, text: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """The attention that every token gets from the text, mean over heads and text tokens.

    Args:
        q: [B, Hq, L, D], k: [B, Hkv, L, D], of the prompt, causal. text: bool [B, L], the queries.
        scale: 1 / sqrt(D) where None. mask: bool [B, L], False for padding.

    Returns:
        f32 [B, L], of which those of the visual tokens count.
    """
    return attention_from(text, q, k, scale, mask)


def spatial_scores(
    grid: tuple[int, int],
    strides: Sequence[int] = (2,),
    weight: float = 3.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """How sparse a regular sample of the image's grid a token belongs to.

    Args:
        grid: (H, W). strides: every stride-th row and column is a sample, of the rate 1 / stride^2.
        weight: a sample's score is 1 - weight * rate.

    Returns:
        f32 [H * W], the best score of a token's samples, 0 where it is in none.

    Raises:
        ValueError: a stride or a side below 1.
    """
    check_minimum(
        1, height=grid[0], width=grid[1], **{f"strides[{i}]": s for i, s in enumerate(strides)}
    )
    rows, columns = (torch.arange(size, device=device) for size in grid)
    scores = torch.full(grid, -torch.inf, device=device)
    for stride in strides:
        sample = (rows % stride == 0)[:, None] & (columns % stride == 0)
        scores = torch.where(sample, scores.clamp(min=1 - weight / stride**2), scores)
    return scores.masked_fill(scores == -torch.inf, 0).flatten()


def thresholds(
    self_score: Tensor,
    cross_score: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The thresholds of every row: sigmoid of two linear functions of the mean scores.

    Args:
        self_score, cross_score: f32 [B, N]. weight: [2, 2], bias: [2], learned: the first row is
            that of attention, the second that of the grid.
        valid: bool [B, N].

    Returns:
        two f32 [B].
    """
    there = torch.ones_like(self_score) if valid is None else valid.float()
    count = there.sum(1).clamp(min=1)
    means = torch.stack([(x.float() * there).sum(1) / count for x in (self_score, cross_score)], 1)
    both = torch.sigmoid(functional.linear(means, weight.float(), bias))
    return both[:, 0], both[:, 1]


def atp_llava(
    redundancy: Tensor,
    spatial: Tensor,
    attention_threshold: float | Tensor,
    spatial_threshold: float | Tensor,
    k: int | None = None,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """The visual tokens whose attention or whose place exceeds its threshold.

    Args:
        redundancy: f32 [B, N], the mean of self_scores and cross_scores.
        spatial: f32 [N] or [B, N], spatial_scores.
        attention_threshold, spatial_threshold: numbers, or [B].
        k: the most that stay, those that exceed a threshold by most; N where None.
        valid: bool [B, N]. order: "position", or "score", by how much they exceed.

    Returns:
        i32 [B, k], -1 behind the last: how many stay depends on the scores.

    Raises:
        ValueError: k below 0, or another order.
    """
    check_count("k", k, optional=True)
    check_order(order)

    def above(scores: Tensor, threshold: float | Tensor) -> Tensor:
        if isinstance(threshold, Tensor):
            threshold = threshold.detach().float().reshape(-1, 1)
        return scores.detach().float() - threshold

    margin = above(redundancy, attention_threshold)
    # A NaN of one is no reason to drop what the other keeps.
    margin = margin.nan_to_num(nan=-torch.inf)
    margin = torch.maximum(margin, above(spatial, spatial_threshold).expand_as(margin))
    if valid is not None:
        margin = margin.masked_fill(~valid, -torch.inf)
    places = margin.shape[1] if k is None else k
    return tokred.topk(margin.contiguous(), places, order=order, threshold=0.0)[1]


METHOD = Method(
    title="ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models",
    arxiv="2412.00447",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="keep visual tokens above a learned threshold of attention, or on a sparse grid",
)
