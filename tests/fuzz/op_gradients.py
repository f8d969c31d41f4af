"""Cases of the backward ops of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from case import Case, namespace, op_case
from draw import BF16, F16, F32, F64, Draw
from op_attention import (
    BATCHED,
    LOOSE,
    biased,
    biased_arguments,
    blocks,
    blocks_arguments,
    lists,
    lists_arguments,
)
from torch import Tensor

import tokred

_SLACK = {F32: 3e-5, F16: 6e-3, BF16: 4e-2, F64: 1e-11}
# The arguments of the backward ops in their order; None where absent.
_BIASED = (
    "grad_out", "grad_lse", "q", "k", "v", "key_bias", "out", "lse", "causal", "scale", "mask",
    "query_position", "key_position", "softcap",
)  # fmt: skip
_SPARSE = (
    "grad_out", "grad_lse", "q", "k", "v", "indices", "out", "lse", "scale", "key_bias", "causal",
    "mask", "block_q", "softcap",
)  # fmt: skip
_BLOCKS = (
    "grad_out", "grad_lse", "q", "k", "v", "block_mask", "block_q", "block_k", "out", "lse",
    "causal", "scale", "key_bias", "mask", "softcap",
)  # fmt: skip


def _backward(
    draw: Draw,
    op: str,
    make: Callable[[Draw], dict[str, Any]],
    plain: Callable[..., Any],
    order: tuple[str, ...],
    of_mask: bool = False,
) -> Case:
    def fits() -> bool:
        """No heads are refused, and a mask of bools has no gradient."""
        mask = some.get("mask")
        numbers = mask is not None and mask.is_floating_point()
        return some["q"].shape[1] > 0 and (numbers or not of_mask)

    some = make(draw)
    while not fits():
        some = make(draw)
    for name in ("rope_cos", "rope_sin"):
        some.pop(name, None)
    if "key_bias" in some and not some["k"].shape[:3].numel():
        del some["key_bias"]  # the raw op returns a gradient [0], autograd shapes it
    if "key_bias" in some:
        # The gradient of a shared bias is that of every item and head.
        full = some["k"].shape[:3]
        some["key_bias"] = some["key_bias"].expand(full).contiguous()
    forward = dict(some)
    out, lse = getattr(tokred, op)(**some)
    some |= {"out": out, "lse": lse}
    some["grad_out"] = draw.floats(out.shape, out.dtype, plain=True)
    some["grad_lse"] = draw.floats(lse.shape, lse.dtype, plain=True) * draw.one_of(0, 1, 1)
    some = {name: some.get(name) for name in order}
    leaves = ["mask"] if of_mask else ["q", "k", "v", "key_bias"]
    leaves = [name for name in leaves if some[name] is not None]
    called = f"{op}_mask_backward" if of_mask else f"{op}_backward"

    def call(**inputs: Any) -> list[Tensor]:
        op_backward = getattr(namespace(), called).default
        result = op_backward(*(inputs[name] for name in order))
        return [result.to(inputs["mask"].dtype)] if of_mask else list(result[: len(leaves)])

    def gradients(grad_out: Tensor, grad_lse: Tensor, **inputs: Any) -> list[Tensor]:
        given = {name: inputs[name] for name in forward}
        asked = {name: given[name].detach().requires_grad_() for name in leaves}
        with torch.enable_grad():
            result, log_sum = plain(**(given | asked))
            log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)
            loss = (result * grad_out).sum() + (log_sum * grad_lse).sum()
            if not loss.requires_grad:
                return [torch.zeros_like(leaf) for leaf in asked.values()]
        return list(torch.autograd.grad(loss, list(asked.values()), materialize_grads=True))

    # With large logits the rounding of a half-precision out decides.
    tested = out.dtype in (F32, F64) or _largest_logit(some) < 100
    # The gradient of a shared mask is that of all items.
    batched = () if of_mask else BATCHED
    return Case(called, some, gradients if tested else None, _SLACK[out.dtype], call=call,
                batched=batched, loose=LOOSE, dense=("lse", "grad_lse"), halves=True)  # fmt: skip


def _largest_logit(some: dict[str, Any]) -> float:
    q, k = some["q"].float(), some["k"].float()
    return float(q.abs().max() * k.abs().max()) * q.shape[3] if q.numel() and k.numel() else 0.0


@op_case
def biased_attention_backward(draw: Draw) -> Case:
    return _backward(draw, "biased_attention", biased_arguments, biased, _BIASED)


@op_case
def biased_attention_mask_backward(draw: Draw) -> Case:
    return _backward(draw, "biased_attention", biased_arguments, biased, _BIASED, of_mask=True)


@op_case
def sparse_attention_backward(draw: Draw) -> Case:
    return _backward(draw, "sparse_attention", lists_arguments, lists, _SPARSE)


@op_case
def block_sparse_attention_backward(draw: Draw) -> Case:
    return _backward(draw, "block_sparse_attention", blocks_arguments, blocks, _BLOCKS)
