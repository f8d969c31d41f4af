"""ToMe's bipartite merge of one item in plain torch, for the tests of methods built on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def tome_links(metric: Tensor, r: int, num_prefix: int = 0) -> list[tuple[int, int]]:
    """(source, destination) of one item [N, C], the most similar first."""
    unit = functional.normalize(metric.double(), dim=-1)
    even = [i for i in range(0, len(metric), 2) if i >= num_prefix]
    odd = [i for i in range(1, len(metric), 2) if i >= num_prefix]
    best, partner = (unit[even] @ unit[odd].T).max(1)
    return [(even[i], odd[partner[i]]) for i in best.argsort(descending=True)[:r].tolist()]


def tome_groups(metric: Tensor, r: int, num_prefix: int = 0) -> list[list[int]]:
    """The groups of one item, those of sources that stay first, then those of destinations."""
    members = {token: [token] for token in range(len(metric))}
    for source, destination in tome_links(metric, r, num_prefix):
        members[destination] += members.pop(source)
    return [sorted(group) for group in members.values()]


def mean_of(x: Tensor, group: list[int], size: Tensor | None = None) -> Tensor:
    """The mean of rows of x [N, C], weighted by their sizes."""
    weight = torch.ones(len(group)) if size is None else size[group]
    return (weight[:, None] * x[group]).sum(0) / weight.sum()
