"""Cases of linear_attention and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, namespace, op_case
from draw import F32, F64, Draw
from torch import Tensor

_DIMS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65, 128, 130, 256)
_ORDER = ("q", "k", "v", "decay", "state", "scale", "mask")
_GRADS = ("grad_out", "grad_state")


def _arguments(draw: Draw) -> dict[str, Any]:
    batch, (heads_q, heads_kv), tokens = draw.batch(), draw.heads(), draw.size()
    heads_q = heads_q or heads_kv
    dim, value_dim = draw.choice(_DIMS), draw.choice(_DIMS)
    dtype = draw.dtype(double=True)
    wide = F64 if dtype == F64 else F32
    some: dict[str, Any] = {
        "q": draw.floats((batch, heads_q, tokens, dim), dtype, plain=True),
        "k": draw.floats((batch, heads_kv, tokens, dim), dtype, plain=True),
        "v": draw.floats((batch, heads_kv, tokens, value_dim), dtype, plain=True),
        "decay": torch.rand(heads_kv, generator=draw.generator(), dtype=wide),
    }
    some["decay"] = some["decay"] * draw.choice([0, 0.01, 0.5, 30])
    if draw.chance():
        some["state"] = draw.floats((batch, heads_kv, dim, value_dim), wide, plain=True)
    some["scale"] = draw.choice([1.0, 0.25, -2.0, 0.0])
    if draw.chance(0.4):
        some["mask"] = draw.mask((draw.choice([1, batch]), tokens))
    return some


def _quadratic(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None = None,
    scale: float = 1.0, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """linear_attention by its masked quadratic form; differentiable."""
    (batch, heads, tokens, _), group = k.shape, q.shape[1] // k.shape[1]
    visible = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    visible = visible.expand(batch, tokens)
    clock = visible.long().cumsum(-1)
    rate = decay[None, :, None, None]
    ages = (clock[:, None, :, None] - clock[:, None, None]).clamp(min=0)
    seen = visible[:, None, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    weight = torch.where(seen, (-rate * ages).exp(), 0)
    if state is None:
        state = q.new_zeros(batch, heads, k.shape[3], v.shape[3])

    def to_queries(t: Tensor) -> Tensor:
        return t.repeat_interleave(group, 1)

    out = (q @ to_queries(k).mT * to_queries(weight)) @ to_queries(v)
    out = out + to_queries((-rate * clock[:, None, :, None]).exp()) * (q @ to_queries(state))
    total = clock[:, -1:] if tokens else torch.zeros(batch, 1, dtype=torch.long)
    left = visible[:, None, :, None] * (-rate * (total - clock)[:, None, :, None]).exp()
    last = (k * left).mT @ v + (-rate * total[:, None, :, None]).exp() * state
    return scale * out, last


def _slack(some: dict[str, Any]) -> float:
    return 1e-13 if some["q"].dtype == F64 else 3e-6


@op_case
def linear_attention(draw: Draw) -> Case:
    some = _arguments(draw)
    batched = ("q", "k", "v", "state", "mask")
    return Case("linear_attention", some, _quadratic, _slack(some), batched=batched,
                loose=("decay", "mask"), halves=True)  # fmt: skip


@op_case
def linear_attention_backward(draw: Draw) -> Case:
    some = _arguments(draw)
    q, k, v, state = some["q"], some["k"], some["v"], some.get("state")
    wide = some["decay"].dtype
    some["grad_out"] = draw.floats((*q.shape[:3], v.shape[3]), q.dtype, plain=True)
    some["grad_state"] = draw.floats((*k.shape[:2], k.shape[3], v.shape[3]), wide, plain=True)
    leaves = [name for name in ("q", "k", "v", "state") if name != "state" or state is not None]
    some = {name: some.get(name) for name in (*_GRADS, *_ORDER)}

    def call(**inputs: Any) -> list[Tensor]:
        backward = namespace().linear_attention_backward.default
        return list(backward(*(inputs[name] for name in (*_GRADS, *_ORDER)))[: len(leaves)])

    def gradients(grad_out: Tensor, grad_state: Tensor, **inputs: Any) -> list[Tensor]:
        asked = {name: inputs[name].detach().requires_grad_() for name in leaves}
        with torch.enable_grad():
            results = _quadratic(**(inputs | asked))
            grads = torch.autograd.grad(
                results, list(asked.values()), (grad_out, grad_state), materialize_grads=True
            )
        return list(grads)

    batched = ("grad_out", "grad_state", "q", "k", "v", "state", "mask")
    return Case("linear_attention_backward", some, gradients, 2 * _slack(some), call=call,
                batched=batched, loose=("decay", "mask", "grad_state"), halves=True)  # fmt: skip
