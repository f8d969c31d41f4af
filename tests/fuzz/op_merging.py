"""Cases of merge, its gradient and its buffers, unmerge and compose."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from compare import Mismatch, same
from draw import F32, F64, Draw
from torch import Tensor

import tokred

MODES = ("sum", "mean", "plain_mean", "amax", "amin", "prune", "maxnorm", "halving")
_CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 300)


def merge_by_members(
    x: Tensor,
    token_map: Tensor,
    num_out: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor]:
    """merge, slot by slot; differentiable."""
    ones = torch.ones(x.shape[:2], dtype=x.dtype)
    size, weight = (ones if t is None else t for t in (size, weight))
    merged, sizes = [], []
    for b in range(x.shape[0]):
        for slot in range(num_out):
            members = (token_map[b] == slot).nonzero()[:, 0]
            sizes.append(size[b, members].sum())
            merged.append(_merged(x[b, members], size[b, members], weight[b, members], mode))
    shape = x.shape[0], num_out
    if not merged:
        return x.new_zeros(*shape, x.shape[2]), x.new_zeros(shape)
    return torch.stack(merged).reshape(*shape, -1), torch.stack(sizes).reshape(shape)


def _merged(x: Tensor, size: Tensor, weight: Tensor, mode: str) -> Tensor:
    """One slot of its members."""
    if not len(x):
        return x.sum(0)
    if mode in ("amax", "amin"):
        return x.amax(0) if mode == "amax" else x.amin(0)
    keeper = int(weight.nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax())
    if mode == "prune":
        return x[keeper]
    if mode == "halving":
        folded = x[keeper]
        for i in range(len(x)):
            folded = folded if i == keeper else (folded + x[i]) / 2
        return folded
    share = weight if mode in ("sum", "plain_mean") else weight * size
    total = share @ x
    if mode == "sum":
        return total
    divisor = total.norm() if mode == "maxnorm" else share.sum()
    if divisor == 0:
        return total * 0
    return total / divisor * (x.norm(dim=-1).max() if mode == "maxnorm" else 1)


def _arguments(draw: Draw) -> tuple[dict[str, Any], bool]:
    """Arguments of merge, and whether some are NaN or infinite."""
    batch, n, channels = draw.batch(), draw.size(), draw.size(_CHANNELS)
    dtype = draw.dtype(double=True)
    state = F64 if dtype == F64 else F32
    x = draw.floats((batch, n, channels), dtype)
    spoiled = draw.chance(0.2)
    slots = draw.choice([0, 1, 2, max(1, n // 2), n, n + 5, 7])
    some: dict[str, Any] = {"x": draw.spoiled(x) if spoiled else x}
    some["token_map"] = draw.indices((batch, n), slots)
    some |= {"num_out": slots, "mode": draw.choice(MODES)}
    if draw.chance(0.4):
        some["size"] = draw.floats((batch, n), state).abs() + draw.choice([0, 0.1, 0.1])
    if draw.chance(0.4):
        weight = draw.floats((batch, n), state)
        some["weight"] = weight if draw.chance(0.3) else weight.abs() + 0.1
    return some, spoiled


_TABLES = ("token_map", "size", "weight")


def _well_conditioned(some: dict[str, Any], smallest: float = 0.0) -> bool:
    """Whether no divisor is a difference of larger numbers."""
    if some["mode"] not in ("mean", "plain_mean", "maxnorm"):
        return True
    shares = [some[name] for name in ("size", "weight") if some.get(name) is not None]
    return all(bool((t > smallest).all()) for t in shares) and some["mode"] != "maxnorm"


@op_case
def merge(draw: Draw) -> Case:
    some, spoiled = _arguments(draw)
    # The direction of a sum that nearly cancels is anything.
    tested = not spoiled and _well_conditioned(some)
    plain = merge_by_members if tested else None
    return Case("merge", some, plain, 3e-6, batched=("x", *_TABLES), loose=_TABLES)


@op_case
def merge_out(draw: Draw) -> Case:
    some, _ = _arguments(draw)
    batch, _, channels = some["x"].shape
    state = F64 if some["x"].dtype == F64 else F32
    slots = some["num_out"]
    out = draw.rubbish(batch * slots * channels, some["x"].dtype)
    some["out"] = out.reshape(batch, slots, channels)
    some["out_size"] = draw.rubbish(batch * slots, state).reshape(batch, slots)

    def call(out: Tensor, out_size: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        expected = tokred.merge(**inputs)
        got = tokred.merge(**inputs, out=out, out_size=out_size)
        same(got, expected, "out= against a fresh result")
        return tuple(t.clone() for t in got)

    names = ("x", *_TABLES, "out", "out_size")
    buffers = ("out", "out_size")
    return Case("merge", some, call=call, batched=names, loose=(*_TABLES, "out_size"),
                written=buffers)  # fmt: skip


@op_case
def merge_backward(draw: Draw) -> Case:
    some, spoiled = _arguments(draw)
    batch, _, channels = some["x"].shape
    dtype = some["x"].dtype
    state = F64 if dtype == F64 else F32
    slots = some.pop("num_out")
    incoming = {
        "grad_y": draw.floats((batch, slots, channels), dtype, plain=True),
        "grad_size": draw.floats((batch, slots), state, plain=True),
    }
    some = incoming | {"size": None, "weight": None} | some
    order = ("grad_y", "grad_size", "x", "token_map", "size", "weight", "mode")
    only_x = draw.chance(0.3)

    def call(**inputs: Any) -> Any:
        grads = namespace().merge_backward.default(*(inputs[name] for name in order), only_x)
        if only_x:
            assert not any(grad.any() for grad in grads[1:])
        # Gradients that are not asked for are not computed.
        asked = (True, *(not only_x and inputs[name] is not None for name in ("size", "weight")))
        return [grad for grad, wanted in zip(grads, asked, strict=True) if wanted]

    def plain(grad_y: Tensor, grad_size: Tensor, mode: str, **inputs: Any) -> list[Tensor]:
        names = [name for name in ("x", "size", "weight") if inputs[name] is not None]
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            y, size = merge_by_members(**(inputs | leaves), num_out=slots, mode=mode)
            loss = (y * grad_y).sum() + (size * grad_size).sum()
        wanted = [leaves["x"]] if only_x else list(leaves.values())
        if not loss.requires_grad:
            return [torch.zeros_like(leaf) for leaf in wanted]
        return list(torch.autograd.grad(loss, wanted, materialize_grads=True))

    tested = not spoiled and _well_conditioned(some, 0.05)
    slack = {F64: 1e-11, F32: 2e-5}.get(dtype, 1e-4)
    loose = ("grad_size", *_TABLES)
    return Case("merge_backward", some, plain if tested else None, slack, call=call,
                batched=order[:-1], loose=loose)  # fmt: skip


@op_case
def unmerge(draw: Draw) -> Case:
    batch, n, slots, channels = draw.batch(), draw.size(), draw.size(), draw.size(_CHANNELS)
    y = draw.floats((batch, slots, channels), draw.dtype(double=True))
    y = draw.spoiled(y) if draw.chance(0.2) else y
    some = {"y": y, "token_map": draw.indices((batch, n), slots)}

    def check(out: Any) -> None:
        expected = torch.zeros(batch, n, channels, dtype=y.dtype)
        for b in range(batch):
            row = some["token_map"][b]
            here = ((row >= 0) & (row < slots)).nonzero()[:, 0]
            expected[b, here] = y[b, row[here].long()]
        same(out, expected, "against indexing")

    return Case("unmerge", some, check=check, batched=("y", "token_map"), loose=("token_map",))


@op_case
def compose(draw: Draw) -> Case:
    batch, n, slots = draw.batch(), draw.size(), draw.size()
    some = {"second": draw.indices((batch, slots), 5), "first": draw.indices((batch, n), slots)}

    def check(out: Any) -> None:
        for b in range(batch):
            second, first = some["second"][b].tolist(), some["first"][b].tolist()
            if out[b].tolist() != [second[f] if 0 <= f < slots else -1 for f in first]:
                raise Mismatch(f"item {b} is not second[first]")

    names = ("second", "first")
    return Case("compose", some, check=check, batched=names, loose=names)
