"""Attention over all keys, with weights and masks, and the union of two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor
from ..attention import (
    backward_flops,
    broadcast_bias,
    broadcast_mask,
    fake_attention,
    fake_gradients,
    forward_flops,
    incoming,
    state_dtype,
    wanted,
)
from ..placements import ATTENTION, ATTENTION_GRADS, not_sharded, sharded
from ..registration import (
    call,
    cast_under_autocast,
    differentiable,
    once_differentiable,
    promote_under_autocast,
    without_gradient,
)

_ops = torch.ops.tokred


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a per-key log-weight: softmax(scale q k^T + key_bias) v, tile by tile.

    With key_bias = log(size) it is ToMe's proportional attention (arXiv:2210.09461), equal to
    attention in which every key stands `size` times. Logits and sums are float32 (float64 for
    float64) and never stored, as in FlashAttention (arXiv:2205.14135). Query head h reads key head
    h // (Hq // Hkv).

    Positions hide keys without an L x N mask: query i sees key j only where key_position[j, c] <=
    query_position[i, c] for every column c. One column is any order of tokens; (position,
    iteration) is duo-causal attention; (entry, -exit) of a depth-first walk is a tree whose nodes
    see their ancestors and themselves, for speculative decoding.

    A hidden key contributes nothing to a query, whatever it and its value hold, NaN and infinities
    included; nor does a visible one whose weight is exactly 0.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, or float64 on the CPU; any outer strides, the
            last dimension contiguous, D and Dv at most 576; on CUDA 256 for gradients.
        k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
        key_bias: float32 (float64 if q is float64) [B | 1, Hkv | 1, N], or [B, N]; -inf hides a
            key.
        causal: query i sees the keys j <= i + N - L: the last query sees them all.
        scale: 1 / sqrt(D) where None.
        mask: [B | 1, Hq | 1, L | 1, N], or [B, N]: bool, True is visible; or numbers that are
            added to the logits, in float32 (float64 if q is float64) or the dtype of q, of which
            -inf hides: relative positions, ALiBi. As in torch's scaled_dot_product_attention, but
            that a query of -inf alone gets zeros. +inf makes a query NaN.
        query_position, key_position: int32 [B | 1, L, c] and [B | 1, N, c] with c = 1 or 2, or
            [B | 1, L] and [B | 1, N] for one column; together or not at all.
        softcap: where given, logits are softcap * tanh(scale q k^T / softcap) before key_bias and
            masks, as in Gemma 2 (arXiv:2408.00118); positive.

    Returns:
        out [B, Hq, L, Dv] in the dtype of q, and lse float32 [B, Hq, L], the log of the sum of the
        exponentials. A query that sees no key has out 0 and lse -inf. Differentiable in q, k, v,
        key_bias and a float mask, once, through out and lse: second derivatives raise a
        RuntimeError. Under autocast q, k and v are cast, key_bias and mask are not.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B Hq L N (D + Dv) flops, memory linear in L and N. The gradient of a mask takes as
        many more, in a pass of its own, and is as large as the mask, in float32.
    """
    if query_position is not None:
        query_position = _columns("query_position", query_position)
    if key_position is not None:
        key_position = _columns("key_position", key_position)
    return call(
        _ops.biased_attention.default,
        q,
        k,
        v,
        broadcast_bias(key_bias),
        causal,
        scale,
        broadcast_mask(mask),
        query_position,
        key_position,
        softcap,
    )


def _columns(name: str, position: Tensor) -> Tensor:
    """Positions [.., N] as [.., N, 1]; others as they are."""
    check_tensor(name, position)
    return position[..., None] if position.dim() == 2 else position


def combine_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The attention over the union of two disjoint sets of keys, from the attention over each.

    With m = max(lse_a, lse_b) and weights w = exp(lse - m), out is the weighted mean of the outs
    and lse = m + log(w_a + w_b). So a prefix shared by a whole batch is attended to once, and
    sequences are split between devices, as in FlashInfer (arXiv:2501.01005).

    Args:
        out_a, out_b: [B, H, L, D] float32, float16 or bfloat16, or float64 on the CPU, the last
            dimension contiguous.
        lse_a, lse_b: float32 (float64 if the outs are) [B, H, L], as the attention ops return them.
            -inf is the empty set: its out is not looked at.

    Returns:
        out in the dtype of out_a, and lse; 0 and -inf where both sets are empty.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
        ValueError: an input requires grad.

    Under autocast out_a and out_b are cast to the wider dtype of the two.

    Complexity: one pass.
    """
    return call(_ops.combine_states.default, out_a, lse_a, out_b, lse_b)


@torch.library.register_fake("tokred::biased_attention")
def _biased_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    return fake_attention(q, k, v)


@torch.library.register_fake("tokred::biased_attention_backward")
def _biased_attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    mask: Tensor | None,
    query_position: Tensor | None,
    key_position: Tensor | None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(q, k, v, key_bias)


@torch.library.register_fake("tokred::biased_attention_mask_backward")
def _biased_attention_mask_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float | None,
    mask: Tensor,
    query_position: Tensor | None,
    key_position: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    return mask.new_empty(mask.shape, dtype=state_dtype(q))


@torch.library.register_fake("tokred::combine_states")
def _combine_states_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    torch._check(out_a.dim() == 4, lambda: f"out_a must be [B, H, L, D], got {out_a.dim()}-D")
    torch._check(out_b.dim() == 4, lambda: f"out_b must be [B, H, L, D], got {out_b.dim()}-D")
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_bias, ctx.causal, ctx.scale, mask, *positions, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, key_bias, mask, *positions, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, key_bias, mask, query_position, key_position, out, lse = ctx.saved_tensors
    arguments = (
        *incoming(grad_out, grad_lse),
        q,
        k,
        v,
        key_bias,
        out,
        lse,
        ctx.causal,
        ctx.scale,
        mask,
        query_position,
        key_position,
        ctx.softcap,
    )
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(t is not None and t.requires_grad for t in (q, k, v, key_bias)):
        found = call(_ops.biased_attention_backward.default, *arguments)
        grads = wanted(found, q, k, v, key_bias)
    grad_mask = None
    if mask is not None and mask.requires_grad:
        grad_mask = call(_ops.biased_attention_mask_backward.default, *arguments).to(mask.dtype)
    return *grads, None, None, grad_mask, None, None, None


differentiable("biased_attention", ("q", "k", "v", "key_bias", "mask"), _backward, _setup_context)
once_differentiable("biased_attention_backward", "biased_attention")
once_differentiable("biased_attention_mask_backward", "biased_attention")
cast_under_autocast("biased_attention", "q", "k", "v")
without_gradient("combine_states")
promote_under_autocast("combine_states", "out_a", "out_b")
sharded("biased_attention", f"{ATTENTION}, query_position blp, key_position bnp -> bhle, bhl")
sharded(
    "biased_attention_backward",
    f"{ATTENTION_GRADS}, query_position blp, key_position bnp -> bhld, bhnd, bhne, bhn",
)
not_sharded(
    "biased_attention_mask_backward",
    "the gradient of a mask is summed over the batch entries and heads that share it: train it on "
    "local tensors",
)
sharded("combine_states", "out_a bhle, lse_a bhl, out_b bhle, lse_b bhl -> bhle, bhl")


@register_flop_formula(_ops.biased_attention)
def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes; masked and causal pairs are counted, as torch counts SDPA."""
    return forward_flops(q, k[2], v)


@register_flop_formula(_ops.biased_attention_mask_backward)
def _mask_backward_flops(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits again, and the gradients of the weights."""
    return forward_flops(q, k[2], v)


@register_flop_formula(_ops.biased_attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any
) -> int:
    return backward_flops(q, k[2], v)
