"""Cases of dpc_knn."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

_TOKENS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 48, 64, 65, 90, 130)
_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 100)


@op_case
def dpc_knn(draw: Draw) -> Case:
    batch, tokens, channels = draw.batch(), draw.size(_TOKENS), draw.size(_CHANNELS)
    # Integers, so that every distance is exact in float32.
    x = torch.randint(-4, 5, (batch, tokens, channels), generator=draw.generator())
    x = x.to(draw.dtype())
    if draw.chance(0.3) and tokens:
        x = x[:, torch.randint(0, tokens, (tokens,), generator=draw.generator())].clone()
    if draw.chance(0.2) and x.numel():
        x.view(-1)[draw.randrange(x.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf])
    some: dict[str, Any] = {
        "x": x,
        "num_clusters": draw.choice([0, 1, 2, tokens // 3, tokens, tokens + 2]),
        "k": draw.choice([1, 2, 5, 7, 33, tokens + 1]),
    }
    if draw.chance(0.5):
        some["mask"] = draw.mask((batch, tokens))
    return Case(
        "dpc_knn",
        some,
        check=lambda out: _check(some, out),
        batched=("x", "mask"),
        loose=("mask",),
    )


def _check(some: dict[str, Any], out: list[Tensor]) -> None:
    x, clusters, k = some["x"].double(), some["num_clusters"], some["k"]
    centers, assignment = out
    here = x.square().sum(-1).isfinite() & some.get("mask", torch.ones(x.shape[:2]) > 0)
    for b in range(len(x)):
        token = here[b].nonzero()[:, 0]
        count = min(clusters, len(token))
        chosen = centers[b].tolist()
        if chosen[count:] != [-1] * (clusters - count) or len(set(chosen[:count])) < count:
            raise Mismatch(f"item {b} has the centres {chosen}, of {len(token)} tokens")
        if not here[b][centers[b, :count].long()].all():
            raise Mismatch(f"item {b} has masked centres: {chosen}")
        if not count:
            if not (assignment[b] == -1).all():
                raise Mismatch(f"item {b} has no centre, but is assigned {assignment[b].tolist()}")
            continue
        rows = x[b, token]
        apart = (rows[:, None] - rows).square().sum(-1)
        mean = apart.sort(1).values[:, :k].mean(1) / max(x.shape[2], 1)
        position = torch.arange(len(token))
        # Means round: only their clear differences rank for sure.
        far = mean[:, None] - mean > 1e-5 * (1 + mean)
        same = (mean[:, None] == mean) & (position < position[:, None])
        smallest, most = far | same, ~(far | same).T & ~torch.eye(len(token), dtype=torch.bool)
        delta = [apart.masked_fill(~m, torch.inf).amin(1).sqrt() for m in (most, smallest)]
        low, high = (d.log() - mean for d in delta)
        place = {int(t): i for i, t in enumerate(token)}
        inside = [place[t] for t in chosen[:count]]
        others = [i for i in range(len(token)) if i not in set(inside)]
        slack = 1e-4 * (1 + float(mean.max())) if len(token) else 0.0
        if others and inside and not float(high[inside].min()) >= float(low[others].max()) - slack:
            raise Mismatch(f"item {b} leaves out a better centre than those of {chosen}")
        expected = torch.full_like(assignment[b], -1)
        if inside:
            nearest = apart[:, inside].argmin(1)
            nearest[inside] = torch.arange(count)
            expected[token] = nearest.int()
        if not torch.equal(expected, assignment[b]):
            raise Mismatch(f"item {b} is assigned {assignment[b].tolist()}, not {expected}")
