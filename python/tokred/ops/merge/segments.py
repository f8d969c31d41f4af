"""Pooling over segments of tokens, and what each token weighs in its segment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._library import check_tensor
from ..placements import sharded
from ..registration import call, differentiable, once_differentiable
from .folded import fold_table, fold_tokens

_ops = torch.ops.tokred

POOL_MODES = ("sum", "mean", "sqrt", "amax", "last", "softmax", "gaussian")


def segment_pool(
    x: Tensor,
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    num_segments: int | None = None,
    mode: str = "mean",
    weight: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Reduces the tokens of every segment to one: x [..., N, C] to [..., S, C].

    Segments are given by their offsets, or by the segment of every token. With w = weight (1 where
    absent), sums over a segment's tokens and their number n:

    ========== =====================================================================================
    "sum"      sum w x
    "mean"     sum w x / sum w
    "sqrt"     sum w x / sqrt(n): length-normalised chunks, as in DHSA (arXiv:2510.24606)
    "amax"     elementwise; NaN wins
    "last"     the token of highest position
    "softmax"  sum a x with a = softmax of `weight` over the segment
    "gaussian" sum a x with a ~ exp(-|x - x_pivot|^2 / (2 sigma^2)), summing to 1: KVMerger
               (arXiv:2407.08454); the pivot is the token of largest `weight`, the first on a tie,
               or the middle one (number n // 2) without weights
    ========== =====================================================================================

    An empty segment, or one whose divisor is 0, is 0. Sums run in float32 (float64 for float64) in
    ascending order of the tokens.

    Args:
        x: [..., N, C] float32, float16, bfloat16, or float64 on the CPU; channels contiguous. The
            leading dimensions, any number of them, must fold into one without a copy.
        offsets: int32 [..., S + 1] or [S + 1] for all, ascending: segment s is the tokens from
            offsets[s] to offsets[s + 1] - 1. Others are in no segment. Looked at on the CPU only:
            elsewhere a token's segment is the number of offsets up to its position, less one.
        ids: int32 [..., N], beside num_segments: the segment of each token, in any order. Entries
            outside [0, num_segments) are in no segment.
        num_segments: S, beside ids.
        mode: one of the table.
        weight: [..., N] float32 (float64 if x is float64); not for amax and last.
        sigma: of "gaussian"; None takes the root of the segment's mean squared distance to its
            pivot.

    Returns:
        [..., S, C] in the dtype of x. Differentiable in x in all modes ("gaussian" through its
        weights too, the pivot being a choice), and in weight in "sum", "mean", "sqrt" and
        "softmax"; "gaussian" refuses weights that require grad.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: both or neither of offsets and ids, descending offsets, or an argument that the
            mode does not take.

    Complexity: O(N C + S C) per row; two reads of x in "gaussian", one in the others.
    """
    check_tensor("x", x)
    if mode not in POOL_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOL_MODES)}, got {mode!r}")
    if x.dim() < 2:
        raise ValueError(f"x must be [..., N, C], got shape {list(x.shape)}")
    if sigma is not None and mode != "gaussian":
        raise ValueError(f"sigma is for mode 'gaussian', and not for {mode!r}")
    rows, slots = _segments(offsets, ids, x.shape[-2], num_segments, x.shape[:-2])
    tokens = fold_tokens(x, "x")
    factor = None if weight is None else fold_table(weight, "weight", x.shape[:-1])
    if mode in ("amax", "last") and factor is not None:
        raise ValueError(f"weight must be None in mode {mode!r}")
    if mode in ("sqrt", "last"):
        share = call(_ops.segment_weights.default, rows, slots, mode)
        share = share.double() if x.dtype == torch.float64 else share
        factor = share if factor is None else share * factor
    elif mode in ("softmax", "gaussian"):
        source = tokens if mode == "gaussian" else None
        factor = call(_ops.segment_weights.default, rows, slots, mode, factor, source, sigma)
    reduce = {"mean": "plain_mean", "amax": "amax", "last": "prune"}.get(mode, "sum")
    y, _ = call(_ops.merge.default, tokens, rows, slots, None, factor, reduce)
    return y.view(*x.shape[:-2], slots, x.shape[-1])


def segment_weights(
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    num_tokens: int | None = None,
    num_segments: int | None = None,
    mode: str = "softmax",
    weight: Tensor | None = None,
    x: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """What every token weighs in its segment: float32 [..., N], 0 for tokens of no segment.

    The weights of `segment_pool`, for a second tensor: keys and values that are pooled alike, as in
    KVMerger (arXiv:2407.08454), take `segment_pool(values, ids=ids, num_segments=S, mode="sum",
    weight=segment_weights(ids=ids, num_segments=S, mode="gaussian", x=keys))`.

    ========== =====================================================================================
    "sqrt"     1 / sqrt(number of tokens)
    "last"     1 for the token of highest position, 0 for the others
    "softmax"  softmax of `weight` over the segment; 0 where all are -inf
    "gaussian" as in `segment_pool`
    ========== =====================================================================================

    Args:
        offsets, ids, num_segments: as in `segment_pool`.
        num_tokens: N, beside offsets where x and weight are absent.
        mode: one of the table.
        weight: [..., N] float32 (float64 with float64 x): the logits of "softmax"; in "gaussian" it
            chooses the pivots.
        x: [..., N, C] of "gaussian", dtypes as in `segment_pool`.
        sigma: of "gaussian", as in `segment_pool`.

    Returns:
        float32 [..., N]; float64 if inputs are float64. Differentiable in weight for "softmax", in
        x for "gaussian"; once.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: both or neither of offsets and ids, N is unknown, or weight of "gaussian"
            requires grad.

    Complexity: O(N), and O(N C) for "gaussian".
    """
    shape: tuple[int, ...] | None = None
    for name, tensor, last in (("x", x, 1), ("weight", weight, 0), ("ids", ids, 0)):
        if tensor is not None:
            check_tensor(name, tensor)
            if tensor.dim() < 1 + last:
                raise ValueError(f"{name} has too few dimensions: {list(tensor.shape)}")
            shape = tensor.shape[: tensor.dim() - last]
            break
    if shape is None and offsets is not None and num_tokens is not None:
        check_tensor("offsets", offsets)
        shape = (*offsets.shape[:-1], num_tokens)
    if shape is None:
        raise ValueError("num_tokens must be given beside offsets, where x and weight are not")
    rows, slots = _segments(offsets, ids, shape[-1], num_segments, shape[:-1])
    table = None if weight is None else fold_table(weight, "weight", shape)
    tokens = None if x is None else fold_tokens(x, "x")
    out = call(_ops.segment_weights.default, rows, slots, mode, table, tokens, sigma)
    return out.view(shape)


def _segments(
    offsets: Tensor | None,
    ids: Tensor | None,
    tokens: int,
    num_segments: int | None,
    leading: tuple[int, ...],
) -> tuple[Tensor, int]:
    """The segment of every token, int32 [B, N], and the number of segments."""
    if (offsets is None) == (ids is None):
        raise ValueError("segments must be given by offsets or by ids, and not by both")
    if ids is not None:
        check_tensor("ids", ids)
        if num_segments is None:
            raise ValueError("num_segments must be given beside ids")
        return fold_table(ids, "ids", (*leading, tokens)), num_segments
    assert offsets is not None
    check_tensor("offsets", offsets)
    if offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32, got {offsets.dtype}")
    if offsets.dim() == 0 or offsets.shape[-1] == 0:
        raise ValueError(f"offsets must be [..., S + 1], got shape {list(offsets.shape)}")
    slots = offsets.shape[-1] - 1
    if num_segments is not None and num_segments != slots:
        raise ValueError(f"num_segments must be {slots} for these offsets, got {num_segments}")
    shared = offsets.dim() == 1
    if not shared and offsets.shape[:-1] != torch.Size(leading):
        want = [*leading, "S + 1"]
        raise ValueError(f"offsets must be {want} or [S + 1], got shape {list(offsets.shape)}")
    readable = type(offsets) is Tensor and not torch.compiler.is_compiling()
    if readable and offsets.device.type == "cpu" and (offsets.diff() < 0).any():
        raise ValueError("offsets must ascend, and do not")
    # A token's segment is the number of offsets up to its position, less one.
    begins = offsets.new_zeros((*offsets.shape[:-1], tokens + 1))
    begins.scatter_add_(-1, offsets.clamp(0, tokens).long(), torch.ones_like(offsets))
    rows = begins[..., :tokens].cumsum(-1, dtype=torch.int32) - 1
    return rows.expand(*leading, tokens).reshape(math.prod(leading), tokens), slots


@torch.library.register_fake("tokred::segment_weights")
def _segment_weights_fake(
    ids: Tensor,
    num_segments: int,
    mode: str,
    weight: Tensor | None = None,
    x: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    torch._check(ids.dim() == 2, lambda: "ids must be [B, N]")
    torch._check(num_segments >= 0, lambda: "num_segments must be at least 0")
    inputs = [t.dtype for t in (weight, x) if t is not None]
    dtype = torch.float64 if torch.float64 in inputs else torch.float32
    return ids.new_empty(ids.shape, dtype=dtype)


@torch.library.register_fake("tokred::segment_weights_backward")
def _segment_weights_backward_fake(
    grad: Tensor,
    weights: Tensor,
    ids: Tensor,
    num_segments: int,
    mode: str,
    weight: Tensor | None,
    x: Tensor | None,
    sigma: float | None,
) -> Tensor:
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format)
        if x is None
        else (x.new_empty(x.shape))
    )


def _weights_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ids, ctx.num_segments, ctx.mode, weight, x, ctx.sigma = inputs
    if ctx.mode == "gaussian" and weight is not None and weight.requires_grad:
        raise ValueError(
            "segment_weights in mode gaussian has a gradient in x alone, but weight, which chooses "
            "the pivots, requires grad: detach it, or use torch.no_grad()"
        )
    ctx.save_for_backward(ids, weight, x, output)


def _weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, weight, x, weights = ctx.saved_tensors
    gradient = call(
        _ops.segment_weights_backward.default, grad, weights, ids, ctx.num_segments, ctx.mode,
        weight, x, ctx.sigma,
    )  # fmt: skip
    in_x = ctx.mode == "gaussian"
    return None, None, None, None if in_x else gradient, gradient if in_x else None, None


differentiable("segment_weights", ("weight", "x"), _weights_backward, _weights_setup)
once_differentiable("segment_weights_backward", "segment_weights")
sharded("segment_weights", "ids bn, weight bn, x bnc -> bn")
sharded("segment_weights_backward", "grad bn, weights bn, ids bn, weight bn, x bnc -> bn")
