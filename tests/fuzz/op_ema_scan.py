"""Cases of ema_scan and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from draw import F32, F64, Draw
from torch import Tensor

_CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300)


def scan(
    c: Tensor, p: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ema_scan, item by item; differentiable."""
    rows, last = [], []
    for b in range(c.shape[0]):
        z = c.new_zeros(c.shape[2], dtype=p.dtype) if state is None else state[b]
        length = c.shape[1] if lengths is None else min(max(int(lengths[b]), 0), c.shape[1])
        item = []
        for i in range(length):
            z = z + p[b, i] * (c[b, i] - z)
            item.append(z)
        zeros = c.new_zeros(c.shape[1] - length, c.shape[2], dtype=p.dtype)
        rows.append(torch.cat([torch.stack(item), zeros]) if item else zeros)
        last.append(z)
    if not rows:
        return torch.zeros_like(c), c.new_zeros(0, c.shape[2], dtype=p.dtype)
    return torch.stack(rows), torch.stack(last)


def _arguments(draw: Draw) -> dict[str, Any]:
    batch, n, channels = draw.batch(), draw.size(), draw.size(_CHANNELS)
    dtype = draw.dtype(double=True)
    wide = F64 if dtype == F64 else F32
    some: dict[str, Any] = {"c": draw.floats((batch, n, channels), dtype)}
    some["p"] = draw.floats((batch, n), wide).sigmoid().clamp(0.05, 1)
    some["state"] = draw.floats((batch, channels), wide) if draw.chance(0.5) else None
    some["lengths"] = draw.indices((batch,), n + 1) if draw.chance(0.5) else None
    return some


@op_case
def ema_scan(draw: Draw) -> Case:
    some = _arguments(draw)
    return Case("ema_scan", some, scan, 1e-5, batched=tuple(some), loose=("p", "state", "lengths"))


@op_case
def ema_scan_backward(draw: Draw) -> Case:
    some = _arguments(draw)
    shape, dtype, wide = some["c"].shape, some["c"].dtype, some["p"].dtype
    some["grad_z"] = draw.floats(shape, dtype, plain=True)
    some["grad_state"] = draw.floats((shape[0], shape[2]), wide, plain=True)
    names = [name for name in ("c", "p", "state") if some[name] is not None]

    def call(grad_z: Tensor, grad_state: Tensor, **inputs: Any) -> list[Tensor]:
        order = [inputs[name] for name in ("c", "p", "state", "lengths")]
        z, _ = namespace().ema_scan.default(*order)
        found = namespace().ema_scan_backward.default(grad_z, grad_state, *order, z)
        return list(found)[: len(names)]

    def plain(grad_z: Tensor, grad_state: Tensor, **inputs: Any) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            z, last = scan(**(inputs | leaves))
            loss = (z * grad_z).sum() + (last * grad_state).sum()
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves.values()]
        return list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))

    slack = {F64: 1e-11, F32: 3e-5}.get(dtype, 3e-2)
    return Case("ema_scan_backward", some, plain, slack, call=call, batched=tuple(some),
                loose=("p", "state", "lengths", "grad_state"))  # fmt: skip
