"""Density-peaks clustering from the whole matrix of distances."""

from __future__ import annotations

import torch
from torch import Tensor


def dpc_knn(
    x: Tensor, num_clusters: int, k: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See tokred.dpc_knn."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    batch, tokens, channels = x.shape
    here = x.float().square().sum(-1).isfinite()
    if mask is not None:
        here = here & mask
    centers = torch.full((batch, num_clusters), -1, dtype=torch.int32, device=x.device)
    assignment = torch.full((batch, tokens), -1, dtype=torch.int32, device=x.device)
    for b in range(batch):
        token = here[b].nonzero()[:, 0]
        rows = x[b, token].to(torch.promote_types(x.dtype, torch.float32))
        count = min(num_clusters, len(token))
        if count == 0:
            continue
        apart = (rows[:, None] - rows).square().sum(-1)
        mean = apart.sort(1).values[:, :k].mean(1) / max(channels, 1)
        earlier = torch.arange(len(token), device=x.device)[:, None] > torch.arange(
            len(token), device=x.device
        )
        denser = (mean < mean[:, None]) | ((mean == mean[:, None]) & earlier)
        delta = apart.masked_fill(~denser, torch.inf).amin(1).sqrt()
        score = torch.where(denser.any(1), delta.log() - mean, torch.inf)
        chosen = score.argsort(descending=True, stable=True)[:count]
        centers[b, :count] = token[chosen].int()
        nearest = apart[:, chosen].argmin(1)
        nearest[chosen] = torch.arange(count, device=x.device)
        assignment[b, token] = nearest.int()
    return centers, assignment
