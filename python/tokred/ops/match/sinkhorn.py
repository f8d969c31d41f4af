"""sinkhorn: wrapper, fake kernel and flop count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import call, differentiable, once_differentiable, promote_under_autocast

__all__ = ["Sinkhorn", "sinkhorn"]

_ops = torch.ops.tokred


class Sinkhorn(NamedTuple):
    """What `sinkhorn` returns: aggregation [B, N, C], load and log_v [B, N], peak and log_u [B, M],
    and steps [B]."""

    aggregation: Tensor
    load: Tensor
    peak: Tensor
    log_u: Tensor
    log_v: Tensor
    steps: Tensor


def sinkhorn(
    x: Tensor,
    anchors: Tensor,
    position_x: Tensor | None = None,
    position_anchors: Tensor | None = None,
    time_x: Tensor | None = None,
    time_anchors: Tensor | None = None,
    mask_x: Tensor | None = None,
    mask_anchors: Tensor | None = None,
    offset: Tensor | None = None,
    position_weight: float = 0.5,
    time_scale: float = 1.5,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float = 0.01,
) -> Sinkhorn:
    """Entropic optimal transport from tokens to anchors, and what every anchor receives.

    The plan T_ij = exp(log_u_i + log_v_j - cost_ij / eps) gives every token the mass 1 / M and
    every anchor 1 / N (of those with mask True), by Sinkhorn's steps (arXiv:1306.0895) in the log
    domain, so that no eps underflows. It never exists in memory, and the costs do only during the
    call. The cost is that of AOT's two stages:

        cost_ij = (1 - cos(x_i, anchor_j) - offset + position_weight |position_i - position_j|)
                  * (1 - exp(-(time_i - time_j)^2 / (2 time_scale^2)))

    with the parts whose tensors are given. A step scales the rows of T to their sums and then the
    columns; an item stops by itself after the step in which exp(log_u) changes by less than
    `tolerance` on average (it starts from 1).

    Args:
        x: [B, M, C] float32, float16 or bfloat16, channels contiguous.
        anchors: [B, N, C], dtype and device of x.
        position_x, position_anchors: float32 [B, M, 2] and [B, N, 2], both or neither.
        time_x, time_anchors: float32 [B, M] and [B, N], both or neither.
        mask_x, mask_anchors: bool [B, M] and [B, N]; False takes the row out.
        offset: float32 [B], what is subtracted from 1 - cos.
        position_weight: finite. time_scale: positive. eps: at least 1e-6.
        iterations: steps at most, at least 1.
        tolerance: at least 0; with 0 all steps are made.

    Returns:
        Sinkhorn: aggregation float32 [B, N, C], the sum of T_ij x_i; load float32 [B, N], the sum
        of T_ij over i; peak float32 [B, M], the largest share max_j T_ij / sum_j T_ij that one
        anchor has of a token; log_u [B, M] and log_v [B, N] float32; steps int32 [B]. A row taken
        out has 0, and -inf as its logarithm; so has everything where no token or no anchor is left.
        NaN in a token that takes part makes its item NaN. Under autocast x and anchors are cast to
        the wider dtype of the two.
        Differentiable in x and anchors, once, through aggregation and load and back through the
        steps that the item made; peak, log_u, log_v and steps have no gradient. A row without
        length has none through its cosine.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: a position, a time or offset requires grad.

    Complexity: 4 B M N C flops, and B M N exponentials a step (twice as many on CUDA). Memory
    4 M N bytes for every thread (on CUDA, for every item). The gradient makes the steps again:
    10 B M N C flops and three times the exponentials (five times on CUDA), with 8 M N bytes and
    M + N floats for every step that was made (on CUDA, for every one of `iterations`, of which
    the gradient takes at most 65536).
    """
    return Sinkhorn(
        *call(
            _ops.sinkhorn.default, x, anchors, position_x, position_anchors, time_x, time_anchors,
            mask_x, mask_anchors, offset, position_weight, time_scale, eps, iterations, tolerance,
        )
    )  # fmt: skip


@torch.library.register_fake("tokred::sinkhorn")
def _sinkhorn_fake(
    x: Tensor,
    anchors: Tensor,
    position_x: Tensor | None = None,
    position_anchors: Tensor | None = None,
    time_x: Tensor | None = None,
    time_anchors: Tensor | None = None,
    mask_x: Tensor | None = None,
    mask_anchors: Tensor | None = None,
    offset: Tensor | None = None,
    position_weight: float = 0.5,
    time_scale: float = 1.5,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, M, C], got {x.dim()}-D")
    torch._check(anchors.dim() == 3, lambda: f"anchors must be [B, N, C], got {anchors.dim()}-D")
    torch._check(x.shape[0] == anchors.shape[0], lambda: "anchors must have the batch size of x")
    torch._check(x.shape[2] == anchors.shape[2], lambda: "anchors must have the channels of x")
    sources, targets = x.shape[:2], anchors.shape[:2]
    shapes = (anchors.shape, targets, sources, sources, targets)
    floats = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return (*floats, x.new_empty(x.shape[:1], dtype=torch.int32))  # type: ignore[return-value]


@torch.library.register_fake("tokred::sinkhorn_backward")
def _sinkhorn_backward_fake(
    grad_aggregation: Tensor,
    grad_load: Tensor,
    x: Tensor,
    anchors: Tensor,
    position_x: Tensor | None,
    position_anchors: Tensor | None,
    time_x: Tensor | None,
    time_anchors: Tensor | None,
    mask_x: Tensor | None,
    mask_anchors: Tensor | None,
    offset: Tensor | None,
    steps: Tensor,
    position_weight: float,
    time_scale: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), anchors.new_empty(anchors.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, position_weight, time_scale, eps, iterations, _ = inputs
    _, _, *others, steps = output
    ctx.save_for_backward(*tensors, steps)
    ctx.mark_non_differentiable(*others, steps)
    ctx.options = position_weight, time_scale, eps, iterations


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_aggregation, grad_load = grads[:2]
    if grad_aggregation.stride(-1) != 1:
        grad_aggregation = grad_aggregation.clone(memory_format=torch.contiguous_format)
    found = call(
        _ops.sinkhorn_backward.default, grad_aggregation, grad_load, *ctx.saved_tensors,
        *ctx.options,
    )  # fmt: skip
    return (*found, *[None] * 12)


differentiable("sinkhorn", ("x", "anchors"), _backward, _setup)
once_differentiable("sinkhorn_backward", "sinkhorn")
promote_under_autocast("sinkhorn", "x", "anchors")
_SETS = (
    "x bmc, anchors bnc, position_x bmp, position_anchors bnp, time_x bm, time_anchors bn, "
    "mask_x bm, mask_anchors bn, offset b"
)
sharded("sinkhorn", f"{_SETS} -> bnc, bn, bm, bm, bn, b")
sharded("sinkhorn_backward", f"grad_aggregation bnc, grad_load bn, {_SETS}, steps b -> bmc, bnc")


@register_flop_formula(_ops.sinkhorn)
def _sinkhorn_flops(x: Any, anchors: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes."""
    batch, sources, channels = x
    return 4 * batch * sources * anchors[1] * channels


@register_flop_formula(_ops.sinkhorn_backward)
def _sinkhorn_backward_flops(
    grad_aggregation: Any, grad_load: Any, x: Any, anchors: Any, *args: Any, **kwargs: Any
) -> int:
    batch, sources, channels = x
    return 10 * batch * sources * anchors[1] * channels
