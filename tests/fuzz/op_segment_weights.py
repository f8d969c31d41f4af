"""Cases of segment_weights, its gradient and segment_pool."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from draw import F32, F64, Draw
from torch import Tensor

import tokred

_CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300)


def weights_by_segment(
    ids: Tensor,
    num_segments: int,
    mode: str,
    weight: Tensor | None = None,
    x: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """segment_weights, segment by segment; differentiable."""
    first = x if x is not None else weight
    rows = []
    for b in range(ids.shape[0]):
        row = torch.zeros(ids.shape[1], dtype=F32 if first is None else first.dtype)
        for segment in range(num_segments):
            here = (ids[b] == segment).nonzero()[:, 0]
            if not len(here):
                continue
            if mode == "softmax":
                share = torch.nan_to_num(weight[b, here].softmax(0), 0)
            elif mode == "gaussian":
                pivot = here[len(here) // 2]
                if weight is not None:
                    pivot = here[int(weight[b, here].argmax())]
                distance = (x[b, here] - x[b, pivot]).square().sum(-1)
                variance = distance.mean() + 1e-8 if sigma is None else sigma**2
                share = (-0.5 * distance / variance).softmax(0)
            elif mode == "last":
                share = (torch.arange(len(here)) == len(here) - 1).to(row.dtype)
            else:
                share = torch.ones(len(here), dtype=row.dtype) / len(here) ** 0.5
            row = row.scatter(0, here, share)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(ids.shape)


def _arguments(draw: Draw, modes: tuple[str, ...]) -> dict[str, Any]:
    batch, n = draw.batch(), draw.size()
    slots = draw.choice([0, 1, 2, max(1, n // 3), n + 2])
    mode = draw.choice(modes)
    some: dict[str, Any] = {"ids": draw.indices((batch, n), slots)}
    some |= {"num_segments": slots, "mode": mode}
    dtype = draw.dtype(double=True)
    state = F64 if dtype == F64 else F32
    if mode == "gaussian":
        some["x"] = draw.floats((batch, n, draw.size(_CHANNELS)), dtype, plain=True)
        some["sigma"] = draw.choice([None, 2.0, 10.0])
    if mode == "softmax" or (mode == "gaussian" and draw.chance(0.5)):
        some["weight"] = draw.floats((batch, n), state)
    return some


def _slack(some: dict[str, Any]) -> float:
    return 1e-11 if any(t.dtype == F64 for t in some.values() if isinstance(t, Tensor)) else 1e-5


@op_case
def segment_weights(draw: Draw) -> Case:
    some = _arguments(draw, ("sqrt", "last", "softmax", "gaussian"))
    slack = _slack(some)

    def call(**inputs: Any) -> Tensor:
        order = ("ids", "num_segments", "mode", "weight", "x", "sigma")
        return namespace().segment_weights.default(*(inputs.get(name) for name in order))

    return Case("segment_weights", some, weights_by_segment, slack, call=call,
                batched=("ids", "weight", "x"), loose=("ids", "weight"))  # fmt: skip


@op_case
def segment_weights_backward(draw: Draw) -> Case:
    some = {"weight": None, "x": None, "sigma": None} | _arguments(draw, ("softmax", "gaussian"))
    slack = _slack(some)
    state = F64 if slack < 1e-8 else F32
    some["grad"] = draw.floats(some["ids"].shape, state, plain=True)
    leaf = "x" if some["mode"] == "gaussian" else "weight"
    order = ("ids", "num_segments", "mode", "weight", "x", "sigma")

    def call(grad: Tensor, **inputs: Any) -> Tensor:
        how = [inputs[name] for name in order]
        weights = namespace().segment_weights.default(*how)
        return namespace().segment_weights_backward.default(grad, weights, *how)

    def plain(grad: Tensor, **inputs: Any) -> Tensor:
        at = inputs[leaf].detach().requires_grad_()
        with torch.enable_grad():
            loss = (weights_by_segment(**(inputs | {leaf: at})) * grad).sum()
        if not loss.requires_grad:
            return torch.zeros_like(at)
        (found,) = torch.autograd.grad(loss, at, allow_unused=True)
        return torch.zeros_like(at) if found is None else found

    half = some["x"] is not None and some["x"].dtype not in (F32, F64)
    return Case("segment_weights_backward", some, plain, 2e-2 if half else 20 * slack, call=call,
                batched=("ids", "weight", "x", "grad"),
                loose=("ids", "weight", "grad"))  # fmt: skip


@op_case
def segment_pool(draw: Draw) -> Case:
    """Offsets against the ids that they stand for."""
    batch, n, channels = draw.batch(), draw.size(), draw.size(_CHANNELS)
    slots = draw.choice([0, 1, 2, max(1, n // 3)])
    x = draw.floats((batch, n, channels), draw.dtype(double=True))
    cuts = torch.randint(0, n + 1, (batch, slots + 1), generator=draw.generator())
    offsets = cuts.sort(-1).values.int()
    mode = draw.choice(["sum", "mean", "sqrt", "amax", "last", "gaussian"])
    some: dict[str, Any] = {"x": x, "offsets": offsets, "mode": mode}

    def check(out: Any) -> None:
        position = torch.arange(n)[:, None]
        starts, ends = offsets[:, None, :-1], offsets[:, None, 1:]
        member = (starts <= position) & (position < ends)
        ids = torch.where(member, torch.arange(slots), -1).amax(-1) if slots else torch.full(
            (batch, n), -1)  # fmt: skip
        same = tokred.segment_pool(x, ids=ids.int(), num_segments=slots, mode=mode)
        torch.testing.assert_close(out, same, equal_nan=True, rtol=1e-3, atol=1e-3)

    return Case("segment_pool", some, check=check, batched=("x", "offsets"), loose=("offsets",))
