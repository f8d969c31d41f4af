"""k-means in plain torch, one item after another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..match import NORM_EPS


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1; a zero row stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=NORM_EPS)


def even_start(usable: Tensor, count: int) -> Tensor:
    """The numbers of `count` tokens, spread evenly over those usable [N]; -1 where none is."""
    numbers = usable.nonzero()[:, 0]
    if not len(numbers):
        return torch.full((count,), -1, device=usable.device)
    k = torch.arange(count, device=usable.device)
    return numbers[(2 * k + 1) * len(numbers) // (2 * count)]


def nearest(x: Tensor, centroids: Tensor, usable: Tensor, metric: str) -> Tensor:
    """The nearest usable centroid of every row, the lowest of equals; -1 where none compares."""
    if not len(centroids):
        return torch.full((len(x),), -1, device=x.device)
    score = x @ centroids.mT
    if metric == "l2":
        score = score - centroids.square().sum(-1) / 2
    score = torch.where(usable & ~score.isnan(), score, -torch.inf)
    best, index = score.max(dim=-1)
    return torch.where(best.isfinite(), index, -1)


def token_starts(start: Tensor, usable: Tensor) -> Tensor:
    """The numbers in a start that name a usable token; -1 for the others."""
    inside = (start >= 0) & (start < len(usable))
    start = torch.where(inside, start, 0)
    good = inside & usable[start] if len(usable) else inside
    return torch.where(good, start, -1)


def _item(
    x: Tensor, usable: Tensor, start: Tensor, iterations: int, metric: str, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C]; start [K] token numbers or [K, C] centroids."""
    rows = unit_rows(x) if metric == "cosine" else x
    alive = torch.ones(len(start), dtype=torch.bool, device=x.device)
    if start.dim() == 1:
        start = token_starts(start.long(), usable)
        alive = start >= 0
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
        start = padded[start]  # the last row for -1
    centroids = unit_rows(start.to(x.dtype)) if metric == "cosine" else start.to(x.dtype)
    for step in range(iterations + 1):
        assignment = nearest(rows, centroids, alive, metric).masked_fill(~usable, -1)
        given = assignment >= 0
        counts = assignment[given].bincount(minlength=len(centroids))
        if step == iterations:
            break
        sums = torch.zeros_like(centroids).index_add_(0, assignment[given], rows[given])
        means = unit_rows(sums) if metric == "cosine" else sums / counts.clamp(min=1)[:, None]
        moved = torch.where((counts > 0)[:, None], means, centroids)
        way = (moved - centroids)[counts > 0].norm(dim=-1)
        centroids = moved
        if (way == 0).all():
            break
        if (way <= tolerance).all():
            iterations = step + 1
    return centroids, assignment, counts


def kmeans(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See tokred.kmeans. Centroids have the precision of x, float32 at least."""
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric {metric!r} is not one of tokred.kmeans's")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, tokens, channels = x.shape
    usable = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    items = []
    for b in range(batch):
        first = even_start(usable[b], num_clusters) if start is None else start[b]
        items.append(_item(x[b], usable[b], first, iterations, metric, tolerance))
    if not items:
        shapes = ((0, num_clusters, channels), (0, tokens), (0, num_clusters))
        centroids, assignment, counts = map(x.new_empty, shapes)
        return centroids, assignment.int(), counts.int()
    centroids, assignment, counts = map(torch.stack, zip(*items, strict=True))
    return centroids, assignment.int(), counts.int()
