"""Clustering and reconstruction against the published iterations on whole matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tokred.methods.expediting_vit import cluster, reconstruct


def grid_of(height: int, width: int) -> torch.Tensor:
    """Neighbours are alike, as in images."""
    small = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(height))
    image = functional.interpolate(small, (height, width), mode="bilinear")
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    return (image * 3 + 0.3 * noise).flatten(2).transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    ("grid", "clusters", "window"), (((8, 8), (4, 4), 3), ((9, 12), (3, 4), 5))
)
def test_cluster(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> None:
    rows, columns = clusters
    x = grid_of(*grid)
    image = x.transpose(1, 2).reshape(2, 6, *grid)
    centroids = functional.adaptive_avg_pool2d(image, clusters).flatten(2).transpose(1, 2)
    number = torch.arange(rows * columns).float().view(1, 1, *clusters)
    first = functional.interpolate(number, grid, mode="nearest").flatten().long()
    near = torch.stack([first // columns, first % columns], 1)
    where = torch.arange(rows * columns)
    where = torch.stack([where // columns, where % columns], 1)
    allowed = ((near[:, None] - where).abs() <= window // 2).all(2)
    for _ in range(4):
        distance = torch.cdist(x.double(), centroids.double()) ** 2
        q = (-0.05 * distance).masked_fill(~allowed, -torch.inf).softmax(2)
        centroids = q.transpose(1, 2) @ x.double() / q.sum(1)[..., None].clamp(min=1e-16)
    done = cluster(x, grid, clusters, 4, 0.05, window)
    torch.testing.assert_close(done.centroids, centroids.float(), rtol=1e-3, atol=1e-4)
    hard = torch.cdist(x.double(), centroids.double()).argmin(2)
    assert torch.equal(done.token_map, hard.int())


@pytest.mark.parametrize("norm", ("l1", "l2"))
def test_reconstruct(norm: str) -> None:
    x = grid_of(8, 8)
    done = cluster(x, (8, 8), (4, 4), 2, 0.05, 3)
    deep = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(2))
    weights = torch.exp(-0.05 * torch.cdist(x, done.centroids) ** 2)
    smallest = weights.topk(3, 2).values[..., -1:]
    weights = torch.where(weights >= smallest, weights, 0)
    weights = functional.normalize(weights, p=1 if norm == "l1" else 2, dim=2)
    found = reconstruct(deep, done, norm=norm)
    torch.testing.assert_close(found, weights @ deep, rtol=1e-3, atol=1e-4)
