"""The exponential moving average along the tokens, whose rate the tokens choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..placements import sharded
from ..registration import call, differentiable, once_differentiable

_ops = torch.ops.tokred


def ema_scan(
    c: Tensor, p: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z_i = (1 - p_i) z_{i-1} + p_i c_i along the tokens, from a state or from 0.

    The smoothing of H-Net (arXiv:2507.07955) and ConceptMoE (arXiv:2601.21420), whose chunks are
    given back to the tokens by `unmerge(z, boundary.cumsum(1).int() - 1)`.

    Args:
        c: [B, M, C] float32, float16, bfloat16, or float64 on the CPU; channels contiguous.
        p: [B, M] float32 (float64 if c is float64), any numbers; at 0 a token changes nothing, at
            1 it takes the place of all before it.
        state: [B, C] float32 (float64 if c is float64), z before the first token.
        lengths: int32 [B]; tokens from lengths[b] on do not count, and their z is 0.

    Returns:
        z [B, M, C] in the dtype of c, and the state after the last token, float32 [B, C] (float64
        if c is float64): two calls with it in between are one. Sums run in float32 (float64 for
        float64). Differentiable in c, p and state, once; in half precision the gradient of p sees z
        as it was rounded.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.

    Complexity: O(B M C), each of c and z touched once.
    """
    return call(_ops.ema_scan.default, c, p, state, lengths)


def _state_dtype(c: Tensor) -> torch.dtype:
    return torch.float64 if c.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tokred::ema_scan")
def _ema_scan_fake(
    c: Tensor, p: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(c.dim() == 3, lambda: f"c must be [B, M, C], got {c.dim()}-D")
    torch._check(p.dim() == 2, lambda: "p must be [B, M]")
    torch._check(p.shape[0] == c.shape[0], lambda: "p must have the batch of c")
    torch._check(p.shape[1] == c.shape[1], lambda: "p must have the tokens of c")
    last = c.new_empty((c.shape[0], c.shape[2]), dtype=_state_dtype(c))
    return c.new_empty(c.shape), last


@torch.library.register_fake("tokred::ema_scan_backward")
def _ema_scan_backward_fake(
    grad_z: Tensor,
    grad_state: Tensor,
    c: Tensor,
    p: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rate = c.new_empty(p.shape, dtype=_state_dtype(c))
    return c.new_empty(c.shape), rate, rate.new_empty((c.shape[0], c.shape[2]))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    c, p, state, lengths = inputs
    ctx.save_for_backward(c, p, state, lengths, output[0])


def _backward(ctx: Any, grad_z: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    c, p, state, lengths, z = ctx.saved_tensors
    if grad_z.stride(-1) != 1:
        grad_z = grad_z.clone(memory_format=torch.contiguous_format)
    grad_c, grad_p, grad_before = call(
        _ops.ema_scan_backward.default, grad_z, grad_state, c, p, state, lengths, z
    )
    return grad_c, grad_p, None if state is None else grad_before, None


differentiable("ema_scan", ("c", "p", "state"), _backward, _setup)
once_differentiable("ema_scan_backward", "ema_scan")
sharded("ema_scan", "c bmc, p bm, state bc, lengths b -> bmc, bc")
sharded(
    "ema_scan_backward",
    "grad_z bmc, grad_state bc, c bmc, p bm, state bc, lengths b, z bmc -> bmc, bm, bc",
)
