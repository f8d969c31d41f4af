"""Density-peak clustering in plain torch, for the tests of methods built on it."""

from __future__ import annotations

import torch
from torch import Tensor


def dpc_knn(x: Tensor, clusters: int, k: int) -> tuple[list[int], Tensor]:
    """(centres by descending score, assignment) of x [N, C], without noise."""
    x = x.double()
    squared = torch.cdist(x, x) ** 2 / x.shape[1]
    near = squared.topk(min(k, len(x)), 1, largest=False).values
    density = torch.exp(-near.mean(1))
    distance = squared.sqrt()
    delta = []
    for i in range(len(x)):
        # Ties of density go to the lower index.
        higher = [j for j in range(len(x)) if (density[j], -j) > (density[i], -i)]
        delta.append(distance[i, higher].min() if higher else distance.max())
    score = density * torch.stack(delta)
    centres = score.argsort(descending=True, stable=True)[:clusters].tolist()
    assignment = distance[:, centres].argmin(1)
    assignment[centres] = torch.arange(len(centres))
    return centres, assignment
