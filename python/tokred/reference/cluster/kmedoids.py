"""k-medoids in plain torch, one item after another."""

from __future__ import annotations

import torch
from torch import Tensor

from .greedy_select import greedy_select
from .kmeans import nearest, token_starts, unit_rows


def distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """[N, M] from differences; of rows of length 1 for cosine, where it is 1 - cos."""
    difference = x[:, None] - y
    if metric == "l2":
        return difference.norm(dim=-1)
    return difference.square().sum(-1) / 2


def _first_of_each(start: Tensor) -> Tensor:
    """The start with -1 for numbers that stand before."""
    same = (start[:, None] == start).tril(-1).any(-1)
    return torch.where(same, -1, start)


def _item(
    x: Tensor, usable: Tensor, start: Tensor, iterations: int, metric: str
) -> tuple[Tensor, Tensor]:
    rows = unit_rows(x) if metric == "cosine" else x
    finite = usable & x.square().sum(-1).isfinite()
    medoids = _first_of_each(token_starts(start.long(), finite))
    alive = medoids >= 0
    for step in range(iterations + 1):
        centroids = rows[medoids] if len(rows) else rows.new_zeros(len(medoids), rows.shape[1])
        assignment = nearest(rows, centroids, alive, metric).masked_fill(~usable, -1)
        assignment[medoids[alive]] = alive.nonzero()[:, 0]
        if step == iterations:
            break
        moved = medoids.clone()
        for k in alive.nonzero()[:, 0].tolist():
            members = (assignment == k).nonzero()[:, 0]
            cost = distances(rows[members], rows[members], metric).sum(-1)
            cost = cost.nan_to_num(torch.inf, torch.inf)
            if cost.min() < torch.inf:
                moved[k] = members[cost.argmin()]
        if torch.equal(moved, medoids):
            break
        medoids = moved
    order = torch.where(alive, medoids, len(x)).argsort(stable=True)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=x.device)
    if len(order):
        assignment = torch.where(assignment >= 0, number[assignment], -1)
    return medoids[order], assignment


def kmedoids(
    x: Tensor,
    num_clusters: int,
    iterations: int = 100,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """See tokred.kmedoids."""
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric {metric!r} is not one of tokred.kmedoids's")
    if start is None:
        start = greedy_select(x, num_clusters, mask=mask, metric=metric, first="norm")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, tokens, _ = x.shape
    usable = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask
    medoids = torch.empty(batch, num_clusters, dtype=torch.int32, device=x.device)
    assignment = torch.empty(batch, tokens, dtype=torch.int32, device=x.device)
    for b in range(batch):
        medoids[b], assignment[b] = _item(x[b], usable[b], start[b], iterations, metric)
    return medoids, assignment
