"""Tokens from the features of their nearest centroids, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def knn_reconstruct(
    deep: Tensor,
    x: Tensor,
    centroids: Tensor,
    k: int = 3,
    temperature: float = 0.05,
    norm: str = "l2",
) -> Tensor:
    """See tokred.knn_reconstruct."""
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm {norm!r} is not one of tokred.knn_reconstruct's")
    wide = torch.promote_types(x.dtype, centroids.dtype)
    distance = (x.to(wide)[:, :, None] - centroids.to(wide)[:, None]).square().sum(-1)
    distance = distance.nan_to_num(torch.inf, torch.inf)
    near, index = distance.sort(dim=-1, stable=True)
    near, index = near[..., :k], index[..., :k]
    weight = (-temperature * (near - near[..., :1])).exp()
    weight = torch.where(near.isfinite(), weight, 0)
    scale = weight.norm(dim=-1, keepdim=True) if norm == "l2" else weight.sum(-1, keepdim=True)
    weight = torch.where(near.isfinite(), weight / scale, 0)
    features = deep.to(torch.promote_types(deep.dtype, torch.float32))
    features, weight = features.to(wide), weight.to(wide)
    y = features.new_zeros(*x.shape[:2], deep.shape[2])
    for place in range(near.shape[-1]):
        row = index[..., place, None].expand(-1, -1, deep.shape[2])
        alive = near[..., place, None].isfinite()
        y = y + torch.where(alive, weight[..., place, None] * features.gather(1, row), 0)
    return y.to(deep.dtype)
