"""A call of every kernel of linear_attention."""

from __future__ import annotations

from typing import Any

import torch
from case import namespace
from launches import Call, draw

import tokred


def _inputs(device: str, tokens: int, dim: int = 64) -> list[Any]:
    rows = [draw((2, heads, tokens, dim), device) for heads in (4, 2, 2)]
    return [*rows, torch.tensor([0.0, 0.1], device=device), draw((2, 2, dim, dim), device)]


def _gradients(device: str) -> Any:
    inputs = _inputs(device, 70)
    out, state = tokred.linear_attention(*inputs)
    return namespace().linear_attention_backward.default(out, state, *inputs, 1.0, None)


CALLS = (
    Call("linear", ("linear_attention_kernel",),
         lambda device: tokred.linear_attention(*_inputs(device, 70))),
    Call("linear, large heads", ("linear_attention_kernel",),
         lambda device: tokred.linear_attention(*_inputs(device, 40, 192))),
    Call("linear, gradients", ("linear_attention_kernel",), _gradients),
    Call("linear, a step", ("linear_step_kernel",),
         lambda device: tokred.linear_attention(*_inputs(device, 1))),
)  # fmt: skip
