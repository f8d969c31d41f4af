"""Cases of knn_reconstruct."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64)


def _check(some: dict[str, Any], y: Tensor) -> None:
    """A mean of rows of deep lies between them."""
    if some["norm"] == "l2" or not y.numel() or not some["deep"].numel():
        return
    deep = some["deep"].float()
    slack = 1e-2 * deep.abs().amax(1, keepdim=True) + 1e-6
    low, high = deep.amin(1, keepdim=True) - slack, deep.amax(1, keepdim=True) + slack
    if not ((y.float() >= low) & (y.float() <= high)).all():
        raise Mismatch("a mean outside of its rows")


@op_case
def knn_reconstruct(draw: Draw) -> Case:
    batch, tokens, channels = draw.batch(), draw.size(), draw.choice(_CHANNELS)
    clusters = draw.choice([0, 1, 2, 5, 31, 32, 33, 70])
    x = draw.floats((batch, tokens, channels), draw.dtype(), plain=True)
    centroids = draw.floats((batch, clusters, channels), plain=True)
    spoiled = draw.chance(0.2)
    if spoiled:
        x, centroids = draw.spoiled(x), draw.spoiled(centroids)
    some: dict[str, Any] = {
        "deep": draw.floats((batch, clusters, draw.choice(_CHANNELS)), draw.dtype(), plain=True),
        "x": x,
        "centroids": centroids.to(torch.float32),
        "k": draw.choice([1, 2, 3, 9, 36, 64]),
        "temperature": draw.choice([0.0, 0.05, 1.0]),
        "norm": draw.choice(["l1", "l2"]),
    }
    return Case(
        "knn_reconstruct",
        some,
        check=None if spoiled else lambda out: _check(some, out),
        batched=("deep", "x", "centroids"),
    )
