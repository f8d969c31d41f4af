"""Applying a map: wrappers, fake kernels and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._library import check_tensor
from ..placements import WRITES, not_sharded, sharded
from ..registration import (
    call,
    call_in_place,
    choose,
    differentiable,
    not_differentiable,
    without_gradient,
    writes,
)
from ..symbolic import check_writable, known

_ops = torch.ops.tokred

LINEAR_MODES = ("sum", "mean", "plain_mean", "prune", "halving")


def merge(
    x: Tensor,
    token_map: Tensor,
    num_out: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
    out: Tensor | None = None,
    out_size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduces x [B, N, C] to [B, num_out, C]: slot o gets the tokens i with token_map[b, i] == o.

    With w = weight and s = size, each 1 where absent, and sums over the members of the slot:

    ============ ===================================================================
    "sum"        sum w x
    "mean"       sum w s x / sum w s: ToMe's size-weighted mean (arXiv:2210.09461)
    "plain_mean" sum w x / sum w: tomesd's mean (arXiv:2303.17604)
    "amax/amin"  elementwise over the members; NaN wins
    "prune"      x of the member of largest w, the first on a tie; NaN counts as smallest
    "maxnorm"    m / |m| * max |x_i| with m = sum w s x: norm-preserving, after ToFu
                 (arXiv:2312.01026)
    "halving"    starts with what "prune" takes, then y <- (y + x) / 2 for every other member in
                 ascending order: the fold of HoliTom (arXiv:2505.21334), where the last weigh most
    ============ ===================================================================

    Entries of token_map outside [0, num_out) are skipped. An empty slot, or one whose divisor is 0,
    is 0. Sums run in float32 (float64 for float64) in ascending order of the tokens, so results are
    the same bits whatever the batch, the thread count and the instruction set.

    Args:
        x: [B, N, C] float32, float16, bfloat16, or float64 on the CPU; channels contiguous.
        token_map: int32 [B, N], from `bipartite_soft_matching`, `threshold_matching`, or your own.
        num_out: number of slots.
        size, weight: [B, N] float32 (float64 if x is float64). `size` is how many tokens each
            token already stands for; `weight` is the w of the table.
        mode: one of the table.
        out, out_size: buffers [B, num_out, C] and float32 [B, num_out] to write into, which share
            no memory with each other and the inputs. Not recorded by autograd: inputs that require
            grad are refused.

    Returns:
        y [B, num_out, C] in the dtype of x, and the merged size float32 [B, num_out] = sum s.
        Differentiable in x, size and weight; amax and amin share a gradient between tied members.
        Second derivatives exist in x alone, in the modes that are linear in it ("sum", "mean",
        "plain_mean", "prune", "halving"); others raise a RuntimeError.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: only one of out and out_size, or buffers beside inputs that require grad.

    Complexity: one pass, O(B (N + num_out) C).
    """
    if out is None and out_size is None:
        return call(_ops.merge.default, x, token_map, num_out, size, weight, mode)
    if out is None or out_size is None:
        raise ValueError("out and out_size must be given together")
    check_tensor("out", out)
    check_tensor("out_size", out_size)
    if out.dim() != 3 or known(out.shape[1] != num_out):
        raise ValueError(f"out must be [B, {num_out}, C] for num_out = {num_out}, got {out.shape}")
    if torch.compiler.is_compiling():
        torch._check(out.shape[1] == num_out)
    written = (out, out_size)
    call_in_place(_ops.merge_out.default, written, x, token_map, size, weight, mode, *written)
    return out, out_size


def unmerge(y: Tensor, token_map: Tensor) -> Tensor:
    """Gives every token the value of its slot: x[b, i] = y[b, token_map[b, i]].

    Tokens mapped outside [0, M) become 0. The inverse of `merge` for unmerged tokens, a copy for
    merged ones, as tomesd (arXiv:2303.17604) does after every layer.

    Args:
        y: [B, M, C] float32, float16, bfloat16, or float64 on the CPU; channels contiguous.
        token_map: int32 [B, N].

    Returns:
        [B, N, C] in the dtype of y. Differentiable in y, any number of times.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.

    Complexity: O(B N C).
    """
    return call(_ops.unmerge.default, y, token_map)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """The map that applies `first`, then `second`: out[b, i] = second[b, first[b, i]].

    -1 where `first` drops the token (or points outside [0, M)); an entry of `second` is passed on
    as it is. Composing the maps of all layers gives the slot of every input token, which ToMe
    (arXiv:2210.09461) keeps as an N x N source matrix.

    Args:
        second: int32 [B, M]. first: int32 [B, N].

    Returns:
        int32 [B, N].

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.

    Complexity: O(B N).
    """
    return choose(_ops.compose.default, second, first)


def _size_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tokred::merge")
def _merge_fake(
    x: Tensor,
    token_map: Tensor,
    num_out: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    torch._check(token_map.dim() == 2, lambda: "token_map must be [B, N]")
    torch._check(token_map.shape[0] == x.shape[0], lambda: "token_map must have the batch of x")
    torch._check(token_map.shape[1] == x.shape[1], lambda: "token_map must have the tokens of x")
    torch._check(num_out >= 0, lambda: "num_out must be at least 0")
    y = x.new_empty((x.shape[0], num_out, x.shape[2]))
    return y, x.new_empty((x.shape[0], num_out), dtype=_size_dtype(x))


@torch.library.register_fake("tokred::merge_out")
def _merge_out_fake(
    x: Tensor,
    token_map: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    merge_mode: str,
    out: Tensor,
    out_size: Tensor,
) -> None:
    torch._check(out.dim() == 3, lambda: f"out must be [B, M, C], got {out.dim()}-D")
    torch._check(out.shape[0] == x.shape[0], lambda: "out must have the batch of x")
    torch._check(out.shape[2] == x.shape[2], lambda: "out must have the channels of x")
    check_writable("out", out)
    check_writable("out_size", out_size)


@torch.library.register_fake("tokred::merge_backward")
def _merge_backward_fake(
    grad_y: Tensor,
    grad_size: Tensor,
    x: Tensor,
    token_map: Tensor,
    size: Tensor | None,
    weight: Tensor | None,
    mode: str,
    only_x: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    table = x.new_empty(x.shape[:2], dtype=_size_dtype(x))
    return x.new_empty(x.shape), table, torch.empty_like(table)


@torch.library.register_fake("tokred::unmerge")
def _unmerge_fake(y: Tensor, token_map: Tensor) -> Tensor:
    torch._check(y.dim() == 3, lambda: f"y must be [B, M, C], got {y.dim()}-D")
    torch._check(token_map.dim() == 2, lambda: "token_map must be [B, N]")
    torch._check(token_map.shape[0] == y.shape[0], lambda: "token_map must have the batch of y")
    return y.new_empty((y.shape[0], token_map.shape[1], y.shape[2]))


@torch.library.register_fake("tokred::compose")
def _compose_fake(second: Tensor, first: Tensor) -> Tensor:
    torch._check(second.dim() == 2, lambda: "second must be [B, M]")
    torch._check(first.dim() == 2, lambda: "first must be [B, N]")
    torch._check(second.shape[0] == first.shape[0], lambda: "second must have the batch of first")
    return first.new_empty(first.shape)


def _merge_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, token_map, _, size, weight, ctx.mode = inputs
    ctx.save_for_backward(x, token_map, size, weight)
    if size is None or not size.requires_grad:
        ctx.mark_non_differentiable(output[1])


def _merge_backward(ctx: Any, grad_y: Tensor, grad_size: Tensor) -> tuple[Tensor | None, ...]:
    x, token_map, size, weight = ctx.saved_tensors
    if grad_y.stride(-1) != 1:
        grad_y = grad_y.clone(memory_format=torch.contiguous_format)
    wanted = [t is not None and t.requires_grad for t in (x, size, weight)]
    grads = call(
        _ops.merge_backward.default, grad_y, grad_size, x, token_map, size, weight, ctx.mode,
        not any(wanted[1:]),
    )  # fmt: skip
    grad_x, grad_size_in, grad_weight = (
        g if want else None for g, want in zip(grads, wanted, strict=True)
    )
    return grad_x, None, None, grad_size_in, grad_weight, None


def _second_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    grad_y, _, _, token_map, size, weight, ctx.mode, _ = inputs
    ctx.num_out = grad_y.shape[1]
    fixed = not any(t is not None and t.requires_grad for t in (size, weight))
    ctx.linear = fixed and ctx.mode in LINEAR_MODES
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(token_map, size, weight)


def _second_backward(
    ctx: Any, grad_x: Tensor | None, grad_size: Tensor | None, grad_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Where y is linear in x, x has no part in its gradient, and the transposed map is merge."""
    if not ctx.linear or grad_size is not None or grad_weight is not None:
        raise RuntimeError(
            f"tokred: merge has second derivatives in the modes {', '.join(LINEAR_MODES)} while "
            f"size and weight do not require grad, and none here, in mode {ctx.mode!r}; "
            "tokred.reference.merge has them all, at the cost of plain torch"
        )
    grad_grad_y = None
    if grad_x is not None:
        token_map, size, weight = ctx.saved_tensors
        if grad_x.stride(-1) != 1:
            grad_x = grad_x.clone(memory_format=torch.contiguous_format)
        grad_grad_y, _ = call(
            _ops.merge.default, grad_x, token_map, ctx.num_out, size, weight, ctx.mode
        )
    return grad_grad_y, None, None, None, None, None, None, None


def _unmerge_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    y, token_map = inputs
    ctx.save_for_backward(token_map)
    ctx.num_out = y.shape[1]


def _unmerge_backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, None]:
    (token_map,) = ctx.saved_tensors
    if grad_x.stride(-1) != 1:
        grad_x = grad_x.clone(memory_format=torch.contiguous_format)
    grad_y, _ = call(_ops.merge.default, grad_x, token_map, ctx.num_out, None, None, "sum")
    return grad_y, None


differentiable("merge", ("x", "size", "weight"), _merge_backward, _merge_setup)
differentiable(
    "merge_backward",
    ("grad_y", "grad_size", "x", "size", "weight"),
    _second_backward,
    _second_setup,
)
differentiable("unmerge", ("y",), _unmerge_backward, _unmerge_setup)
not_differentiable("compose")
without_gradient("merge_out", "merge with out")
writes("merge_out")
sharded("merge", "x bnc, token_map bn, size bn, weight bn -> bmc, bm")
not_sharded("merge_out", WRITES)
sharded(
    "merge_backward",
    "grad_y bmc, grad_size bm, x bnc, token_map bn, size bn, weight bn -> bnc, bn, bn",
)
sharded("unmerge", "y bmc, token_map bn -> bnc")
sharded("compose", "second bm, first bn -> bn")
