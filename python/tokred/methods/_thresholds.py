"""Thresholds of scores, one a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit_range(values: Tensor, valid: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """f32 [..., N]: values - smallest, divided by (largest - smallest + eps), over the valid ones.

    NaN stays, and bounds nothing. Equal values give 0.
    """
    values = values.float()
    if values.shape[-1] == 0:
        return values
    bounds = ~values.isnan() if valid is None else valid & ~values.isnan()
    low, high = (values.masked_fill(~bounds, bound) for bound in (torch.inf, -torch.inf))
    smallest, largest = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    return (values - smallest) / (largest - smallest + eps)


def percentile(values: Tensor, q: float, valid: Tensor | None = None) -> Tensor:
    """f32 [..., 1]: the q-th percentile of every row, q in [0, 100], linear between two values.

    Rows without a valid value give NaN.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be in [0, 100], got {q}")
    values = values.float()
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    if valid is None:
        count = torch.full_like(values[..., :1], values.shape[-1], dtype=torch.float64)
    else:
        values = values.masked_fill(~valid, torch.inf)
        count = valid.expand_as(values).sum(-1, keepdim=True).double()
    ascending = values.sort(-1).values
    place = (count - 1).clamp(min=0) * (q / 100)
    low = place.floor()
    below = ascending.gather(-1, low.long())
    above = ascending.gather(-1, torch.minimum(low + 1, (count - 1).clamp(min=0)).long())
    found = torch.where(above > below, below + (above - below) * (place - low).float(), below)
    return torch.where(count > 0, found, torch.nan)


def elbow(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """f32 [..., 1]: the value at the elbow of every row's descending values.

    That is the point (rank, value) farthest from the chord between the first and the last point,
    the first of several. Rows without a valid value give inf.
    """
    values = values.float()
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.inf)
    if valid is None:
        last = torch.full_like(values[..., :1], values.shape[-1] - 1, dtype=torch.int64)
    else:
        values = values.masked_fill(~valid, -torch.inf)
        last = valid.expand_as(values).sum(-1, keepdim=True) - 1
    descending = values.sort(-1, descending=True).values
    rank = torch.arange(values.shape[-1], device=values.device)
    end = descending.gather(-1, last.clamp(min=0))
    rise = (end - descending[..., :1]).double()
    # Up to the chord's length, which is the same for all points of a row.
    away = (rise * rank - last * (descending - descending[..., :1]).double()).abs()
    place = away.masked_fill(rank > last, -1.0).argmax(-1, keepdim=True)
    return torch.where(last >= 0, descending.gather(-1, place), torch.inf)


def soft_topk(scores: Tensor, k: int | Tensor, iterations: int = 64) -> Tensor:
    """f32 [..., N]: sigmoid(scores + t) with the t of every row at which they sum to k.

    VisionSelector's relaxation of the k best, by bisection. k is an int from 0 to N, or such [...].
    """
    scores = scores.double()
    total = torch.as_tensor(k, dtype=torch.float64, device=scores.device)
    total = total.expand(scores.shape[:-1])[..., None]
    low = -scores.amax(-1, keepdim=True) - 10 - math.log(max(scores.shape[-1], 1))
    high = -scores.amin(-1, keepdim=True) + 10 + math.log(max(scores.shape[-1], 1))
    for _ in range(iterations):
        middle = (low + high) / 2
        below = torch.sigmoid(scores + middle).sum(-1, keepdim=True) < total
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.sigmoid(scores + (low + high) / 2).float()
