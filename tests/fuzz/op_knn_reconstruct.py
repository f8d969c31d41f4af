"""Cases of knn_reconstruct and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

import tokred

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


def _arguments(draw: Draw) -> tuple[dict[str, Any], bool]:
    """Arguments, and whether they hold NaN or infinities."""
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
    return some, spoiled


@op_case
def knn_reconstruct(draw: Draw) -> Case:
    some, spoiled = _arguments(draw)
    return Case(
        "knn_reconstruct",
        some,
        check=None if spoiled else lambda out: _check(some, out),
        batched=("deep", "x", "centroids"),
    )


def _check_adjoint(deep: Tensor, grad_y: Tensor, options: dict[str, Any], found: Tensor) -> None:
    """<found, deep> is <grad_y, y>, up to the rounding of found and y."""
    y = tokred.knn_reconstruct(deep, **options)
    ours, theirs = found.double() * deep.double(), grad_y.double() * y.double()
    unit = max(torch.finfo(deep.dtype).eps, 1e-5)
    slack = unit * (1 + float(ours.abs().sum() + theirs.abs().sum()))
    if abs(float(ours.sum() - theirs.sum())) > slack:
        raise Mismatch("not the adjoint")


@op_case
def knn_reconstruct_backward(draw: Draw) -> Case:
    some, spoiled = _arguments(draw)
    deep = some.pop("deep")
    shape = (*some["x"].shape[:2], deep.shape[2])
    grad_y = draw.floats(shape, deep.dtype, plain=True)

    def call(grad_y: Tensor, **inputs: Any) -> Tensor:
        return namespace().knn_reconstruct_backward.default(grad_y, *inputs.values())

    return Case(
        "knn_reconstruct_backward",
        {"grad_y": grad_y} | some,
        check=None if spoiled else lambda out: _check_adjoint(deep, grad_y, some, out),
        call=call,
        batched=("grad_y", "x", "centroids"),
    )
