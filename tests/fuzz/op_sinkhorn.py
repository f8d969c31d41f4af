"""Cases of sinkhorn and its gradient: beside plain torch, at a number of steps that is given."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from draw import BF16, F16, F32, Draw
from torch import Tensor

from tokred import reference

_TENSORS = (
    "x", "anchors", "position_x", "position_anchors", "time_x", "time_anchors", "mask_x",
    "mask_anchors", "offset",
)  # fmt: skip


def _arguments(draw: Draw) -> tuple[dict[str, Any], list[str]]:
    """Arguments, and the names of those that may have any strides."""
    batch, channels = draw.batch(), draw.channels()
    sides = {"x": draw.size(), "anchors": draw.size()}
    some: dict[str, Any] = {}
    dtype, loose = draw.dtype(), []
    extras = [name for name in ("position", "time", "mask") if draw.chance(0.4)]
    for name, count in sides.items():
        some[name] = draw.floats((batch, count, channels), dtype, plain=True)
        if "position" in extras:
            some[f"position_{name}"] = torch.rand(batch, count, 2, generator=draw.generator())
        if "time" in extras:
            time = torch.randint(0, 5, (batch, count), generator=draw.generator())
            some[f"time_{name}"] = time.float()
            loose.append(f"time_{name}")
        if "mask" in extras:
            some[f"mask_{name}"] = draw.mask((batch, count))
            loose.append(f"mask_{name}")
    if draw.chance(0.2):
        some["offset"] = torch.rand(batch, generator=draw.generator())
        loose.append("offset")
    some["eps"] = draw.choice([0.1, 0.5, 0.05])
    some["iterations"] = draw.choice([1, 2, 7])
    some["tolerance"] = 0.0
    return some, loose


def _batched(some: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in some if name not in ("eps", "iterations", "tolerance"))


@op_case
def sinkhorn(draw: Draw) -> Case:
    some, loose = _arguments(draw)
    return Case(
        "sinkhorn",
        some,
        plain=lambda **arguments: reference.sinkhorn(**arguments)[:3],
        slack=1e-4,
        batched=_batched(some),
        loose=tuple(loose),
        measure=lambda out: out[:3],
    )


@op_case
def sinkhorn_backward(draw: Draw) -> Case:
    some, loose = _arguments(draw)
    dtype = some["x"].dtype
    some["grad_aggregation"] = draw.floats(some["anchors"].shape, plain=True)
    some["grad_load"] = draw.floats(some["anchors"].shape[:2], plain=True)

    def call(grad_aggregation: Tensor, grad_load: Tensor, **inputs: Any) -> list[Tensor]:
        steps = namespace().sinkhorn.default(**inputs)[5]
        tensors = (inputs.get(name) for name in _TENSORS)
        options = (0.5, 1.5, inputs["eps"], inputs["iterations"])
        op = namespace().sinkhorn_backward.default
        return list(op(grad_aggregation, grad_load, *tensors, steps, *options))

    def plain(grad_aggregation: Tensor, grad_load: Tensor, **inputs: Any) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "anchors")}
        with torch.enable_grad():
            aggregation, load, *_ = reference.sinkhorn(**(inputs | leaves))
            loss = (aggregation * grad_aggregation).sum() + (load * grad_load).sum()
        return list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))

    slack = {F32: 3e-4, F16: 3e-3, BF16: 2e-2}[dtype]
    return Case("sinkhorn_backward", some, plain, slack, call=call, batched=_batched(some),
                loose=(*loose, "grad_load"))  # fmt: skip
