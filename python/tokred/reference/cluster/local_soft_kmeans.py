"""Soft clusters of a grid of tokens, in plain torch, with all distances in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .kmeans import nearest


def _visible(grid: tuple[int, int], clusters: tuple[int, int], radius: int) -> Tensor:
    """Whether a centroid is at most `radius` cells from a token's cell: bool [H * W, h * w]."""
    near = []
    for tokens, cells in zip(grid, clusters, strict=True):
        cell = torch.arange(tokens) * cells // max(tokens, 1)
        near.append((cell[:, None] - torch.arange(cells)).abs() <= radius)
    both = near[0][:, None, :, None] & near[1][None, :, None, :]
    return both.reshape(grid[0] * grid[1], clusters[0] * clusters[1])


def _pooled(x: Tensor, grid: tuple[int, int], clusters: tuple[int, int], usable: Tensor) -> Tensor:
    """Means [h * w, C] of the usable tokens of x [H * W, C]; 0 where there is none."""
    channels = x.shape[1]
    if not clusters[0] * clusters[1] * channels:
        return x.new_zeros(clusters[0] * clusters[1], channels)
    share = usable.to(x.dtype).view(1, 1, *grid)
    tokens = torch.where(usable[:, None], x, 0).mT.reshape(1, channels, *grid)
    total = adaptive_avg_pool2d(tokens, clusters) / adaptive_avg_pool2d(share, clusters)
    return total.nan_to_num(0)[0].flatten(1).mT


def local_soft_kmeans(
    x: Tensor,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    iterations: int = 5,
    temperature: float = 0.05,
    window: int = 7,
) -> tuple[Tensor, Tensor]:
    """See tokred.local_soft_kmeans. Centroids have the precision of x, float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, tokens, channels = x.shape
    count = clusters[0] * clusters[1]
    visible = _visible(grid, clusters, window // 2).to(x.device)
    centroids = x.new_empty(batch, count, channels)
    assignment = torch.empty(batch, tokens, dtype=torch.int32, device=x.device)
    for b in range(batch):
        usable = x[b].square().sum(-1).isfinite()
        rows = torch.where(usable[:, None], x[b], 0)
        centroid = _pooled(x[b], grid, clusters, usable)
        for _ in range(iterations if count else 0):
            distance = (rows[:, None] - centroid).square().sum(-1)
            logits = (-temperature * distance).masked_fill(~visible, -torch.inf)
            weight = logits.softmax(-1) * usable[:, None]
            total = weight.sum(0)[:, None]
            moved = weight.mT @ rows / total.clamp(min=1e-16)
            centroid = torch.where(total > 0, moved, centroid)
        centroids[b] = centroid
        alive = torch.ones(count, dtype=torch.bool, device=x.device)
        assignment[b] = nearest(x[b], centroid, alive, "l2")
    return centroids, assignment
