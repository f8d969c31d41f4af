"""LVLM_CSP: layers of a language model see few visual tokens, then all, then few that matter.

LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for
Reasoning Segmentation (arXiv 2504.10854).

An approximate version: which layers belong to which stage is not known to us and is the caller's,
and so is the score by which the last stage prunes; of an instance the tokens are evenly spaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.selection import scatter_back

from ._budgets import keep_count
from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs
from ._picks import best, positions_of, ranks_in_groups, spaced_picks


def uniform(batch: int, tokens: int, count: int, device: torch.device | None = None) -> Tensor:
    """Every (N // count)-th token: i32 [B, count].

    Raises:
        ValueError: count is not from 1 to N.
    """
    check_count("count", count, minimum=None)
    if not 1 <= count <= tokens:
        raise ValueError(f"count must be from 1 to {tokens}, got {count}")
    places = torch.arange(count, dtype=torch.int32, device=device) * (tokens // count)
    return places.repeat(batch, 1)


def by_class_attention(attention: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """The tokens of most class attention f32 [B, N]: i32 [B, count], ascending."""
    check_minimum(1, count=count)
    return best(attention, min(count, attention.shape[1]), valid)


def by_instances(instance: Tensor, count: int) -> Tensor:
    """Tokens of every instance of a segmentation, in proportion to its area.

    Args:
        instance: i32 [B, N], the number of every token's instance, from 0 to N - 1, -1 for none.
        count: an instance gets max(1, count * area // sum of areas) tokens.

    Returns:
        i32 [B, N], ascending, -1 behind the last.
    """
    check_minimum(1, count=count)
    rank, area = ranks_in_groups(instance)
    total = (instance >= 0).sum(1, keepdim=True).clamp(min=1)
    picks = (area * count).div(total, rounding_mode="floor").clamp(min=1)
    chosen = spaced_picks(rank, area, torch.minimum(picks, area)) & (instance >= 0)
    return positions_of(chosen)


def scatter(x: Tensor, clustered: Tensor, indices: Tensor) -> Tensor:
    """All visual tokens again: x [B, N, C] from before the first stage, in it what became of those
    at `indices` i32 [B, K], clustered [B, K, C]."""
    return scatter_back(x, clustered, indices)


def prune(
    scores: Tensor, keep: int | None = None, ratio: float | None = None, order: str = "position"
) -> Tensor:
    """The tokens of the last stage: the best scores f32 [B, N], such as the text's attention.

    Returns:
        i32 [B, K], K = keep, or ratio of N rounded down.
    """
    return best(scores, keep_count(scores.shape[1], keep, ratio), order=order)


METHOD = Method(
    title=(
        "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and "
        "Pruning for Reasoning Segmentation"
    ),
    arxiv="2504.10854",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="few visual tokens in early layers, all again, then few that the text looks at",
)
