"""Cases of kmeans."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 100)


def _check(some: dict[str, Any], out: list[Tensor]) -> None:
    """Counts, range, and that no centroid is much nearer than the one chosen."""
    centroids, assignment, counts = out
    clusters = some["num_clusters"]
    if ((assignment < -1) | (assignment >= clusters)).any():
        raise Mismatch("an assignment out of range")
    if "mask" in some and (assignment[~some["mask"]] != -1).any():
        raise Mismatch("a masked token was assigned")
    member = assignment[..., None] == torch.arange(clusters)
    if not torch.equal(member.sum(1), counts.long()):
        raise Mismatch("counts are not those of the assignment")
    x, c = some["x"].double(), centroids.double()
    if not (x.isfinite().all() and c.isfinite().all()) or not member.any():
        return
    score, size = x @ c.mT, x.norm(dim=-1)[..., None] * c.norm(dim=-1)[:, None]
    if some["metric"] == "l2":
        score = score - c.square().sum(-1)[:, None] / 2
        size = size + c.square().sum(-1)[:, None]
    used = counts > 0  # a centroid without tokens may never have been set
    score = score.masked_fill(~used[:, None], -torch.inf)
    chosen = score.gather(2, assignment.clamp(min=0).long()[..., None])[..., 0]
    given = assignment >= 0
    allowed = 2e-5 * size.amax(-1) + 1e-30
    if (score.amax(-1) - chosen > allowed)[given].any():
        raise Mismatch("a nearer centroid was passed over")


@op_case
def kmeans(draw: Draw) -> Case:
    batch, tokens, channels = draw.batch(), draw.size(), draw.choice(_CHANNELS)
    clusters = draw.choice([0, 1, 2, 3, 7, 16, 17, 33, 70])
    x = draw.floats((batch, tokens, channels), draw.dtype())
    if draw.chance(0.2):
        x = draw.spoiled(x)
    some: dict[str, Any] = {"x": x, "num_clusters": clusters}
    some["iterations"] = draw.choice([0, 1, 2, 5])
    some["metric"] = draw.choice(["l2", "cosine"])
    some["tolerance"] = draw.choice([0.0, 0.0, 0.1])
    if draw.chance(0.4):
        some["mask"] = draw.mask((batch, tokens))
    if draw.chance(0.3):
        some["start"] = draw.indices((batch, clusters), tokens)
    elif draw.chance(0.3):
        some["start"] = draw.floats((batch, clusters, channels))
    loose = ("mask", "start") if some.get("start", x).dtype == torch.int32 else ("mask",)
    return Case(
        "kmeans",
        some,
        check=lambda out: _check(some, out),
        batched=("x", "mask", "start"),
        loose=loose,
    )
