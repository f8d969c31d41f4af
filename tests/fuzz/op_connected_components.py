"""Cases of connected_components."""

from __future__ import annotations

import torch
from case import Case, op_case
from compare import same
from draw import Draw
from torch import Tensor

_SIDES = (0, 1, 2, 3, 5, 8, 13, 17, 33)
_CHANNELS = (0, 1, 3, 8, 15, 16, 17, 33, 64, 100)


def _distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (a - b).norm(dim=-1)
    norms = [t.norm(dim=-1).clamp(min=1e-12) for t in (a, b)]
    return 1 - (a * b).sum(-1) / norms[0] / norms[1]


def _between(distances: Tensor) -> float:
    """A threshold that is far from every distance."""
    ranked = distances[distances.isfinite()].unique()
    if len(ranked) < 2:
        return float(ranked[0]) + 1 if len(ranked) else 1.0
    place = int(ranked.diff().argmax())
    return float(ranked[place] + ranked[place + 1]) / 2


def _joined(edges: list[tuple[int, int]], taken: list[bool]) -> tuple[list[int], int]:
    """Labels by the first member, and their number; labels spread along one edge at a time."""
    labels = list(range(len(taken)))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            if labels[a] != labels[b]:
                labels[a] = labels[b] = min(labels[a], labels[b])
                changed = True
    roots = sorted({label for label, there in zip(labels, taken, strict=True) if there})
    number = {root: place for place, root in enumerate(roots)}
    named = [number[label] if there else -1 for label, there in zip(labels, taken, strict=True)]
    return named, len(roots)


@op_case
def connected_components(draw: Draw) -> Case:
    batch, height, width = draw.batch(), draw.choice(_SIDES), draw.choice(_SIDES)
    x = draw.floats((batch, height, width, draw.choice(_CHANNELS)), draw.dtype())
    if x.numel() and draw.chance(0.2):
        x.view(-1)[draw.randrange(x.numel())] = torch.nan
    metric = draw.choice(["l2", "cosine"])
    wide = x.double()
    right = _distance(wide[:, :, :-1], wide[:, :, 1:], metric)
    below = _distance(wide[:, :-1], wide[:, 1:], metric)
    threshold = _between(torch.cat([right.flatten(), below.flatten()]))
    some = {"x": x, "threshold": threshold, "metric": metric}
    if draw.chance(0.5):
        some["mask"] = draw.mask((batch, height * width))

    def check(out: list[Tensor]) -> None:
        labels, counts = torch.zeros_like(out[0]), torch.zeros_like(out[1])
        taken = some.get("mask", torch.ones(batch, height * width, dtype=torch.bool))
        position = torch.arange(height * width).view(height, width)
        for item in range(batch):
            edges = []
            for near, here, there in (
                (right[item] < threshold, position[:, :-1], position[:, 1:]),
                (below[item] < threshold, position[:-1], position[1:]),
            ):
                near = near & taken[item][here] & taken[item][there]
                edges += list(zip(here[near].tolist(), there[near].tolist(), strict=True))
            named, count = _joined(edges, taken[item].tolist())
            labels[item], counts[item] = torch.tensor(named, dtype=torch.int32), count
        same(out, (labels, counts), "components")

    return Case("connected_components", some, check=check, batched=("x", "mask"), loose=("mask",))
