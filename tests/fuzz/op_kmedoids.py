"""Cases of kmedoids."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 100)


def _check(some: dict[str, Any], out: list[Tensor]) -> None:
    """Ascending medoids that own themselves, each token with the nearest of them."""
    medoids, assignment = out
    batch, tokens, _ = some["x"].shape
    mask = some.get("mask", torch.ones(batch, tokens, dtype=torch.bool))
    if (assignment[~mask] != -1).any():
        raise Mismatch("a masked token was assigned")
    finite = bool(some["x"].isfinite().all())
    for b in range(batch):
        alive = medoids[b][medoids[b] >= 0].long()
        if not (medoids[b, len(alive) :] == -1).all() or not (alive.diff() > 0).all():
            raise Mismatch("medoids do not ascend")
        if len(alive) and (alive[-1] >= tokens or not mask[b][alive].all()):
            raise Mismatch("a medoid is no usable token")
        if (assignment[b] >= max(len(alive), 1)).any() or (assignment[b] < -1).any():
            raise Mismatch("an assignment out of range")
        if not torch.equal(assignment[b][alive].long(), torch.arange(len(alive))):
            raise Mismatch("a medoid belongs to another")
        if not finite or not len(alive):
            continue
        x = some["x"][b].double()
        if some["metric"] == "cosine":
            x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        square = (x[:, None] - x[alive]).square().sum(-1)
        given = assignment[b] >= 0
        chosen = square.gather(1, assignment[b].clamp(min=0).long()[:, None])[:, 0]
        largest = x.square().sum(-1).max()
        if (chosen - square.amin(1) > 1e-4 * largest + 1e-30)[given].any():
            raise Mismatch("a nearer medoid was passed over")


@op_case
def kmedoids(draw: Draw) -> Case:
    batch, tokens, channels = draw.batch(), draw.size(), draw.choice(_CHANNELS)
    clusters = draw.choice([0, 1, 2, 3, 7, 16, 17, 33])
    x = draw.floats((batch, tokens, channels), draw.dtype())
    if draw.chance(0.2):
        x = draw.spoiled(x)
    some: dict[str, Any] = {"x": x, "num_clusters": clusters}
    some["iterations"] = draw.choice([0, 1, 2, 5])
    some["metric"] = draw.choice(["l2", "cosine"])
    some["start"] = draw.indices((batch, clusters), tokens)
    if draw.chance(0.4):
        some["mask"] = draw.mask((batch, tokens))
    return Case(
        "kmedoids",
        some,
        check=lambda out: _check(some, out),
        batched=("x", "mask", "start"),
        loose=("mask", "start"),
    )
