"""Attention over lists of keys: wrapper, fake kernels, gradients, autocast and flop counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor, refuse_history
from ..attention import (
    backward_flops,
    broadcast_bias,
    broadcast_mask,
    fake_attention,
    fake_gradients,
    forward_flops,
    incoming,
    wanted,
)
from ..placements import ATTENTION, ATTENTION_GRADS, sharded
from ..registration import (
    call,
    cast_under_autocast,
    differentiable,
    once_differentiable,
)
from ..symbolic import check_dim, known, larger

_ops = torch.ops.tokred


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    block_q: int | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which every query sees only the keys its list names; they are read in place.

    Query i of head h attends to the keys indices[b, h', i // block_q]; a list belongs to one query
    head, to a key head, or to all heads. Entries outside [0, N) are skipped, and a key listed twice
    counts twice. What mask, causal and key_bias hide stays hidden: indices may point at masked or
    future keys, as those of DeepSeek-V3.2 do.

    Where all of N is listed in order the result is that of `biased_attention` up to rounding. With
    rope_cos and rope_sin a listed key is rotated to its position in the list before its logit is
    computed, as TokenSelect (arXiv:2411.02886) does with keys cached unrotated: with h = D / 2,
    k'[d] = k[d] cos[s, d] - k[d + h] sin[s, d] and k'[d + h] = k[d + h] cos[s, d] + k[d] sin[s, d]
    for entry s of the list, in float32. Queries are not rotated.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, or float64 on the CPU; any outer strides, the
            last dimension contiguous, D and Dv at most 576; on CUDA 256 for gradients
            and rope_cos.
        k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
        indices: int32 [B, Hq | Hkv | 1, ceil(L / block_q), K], the last dimension contiguous.
        scale: 1 / sqrt(D) where None.
        key_bias: float32 (float64 if q is float64) [B | 1, Hkv | 1, N], or [B, N].
        causal: query i sees the keys j <= i + N - L.
        mask: [B | 1, Hq | 1, L | 1, N], or [B, N]: bool, True is visible; or numbers that are
            added to the logits, in float32 or the dtype of q, of which -inf hides.
        block_q: consecutive queries that share a list; where None, L if there is one list, else 1.
        rope_cos, rope_sin: float32 [K or more, D / 2]; together or not at all, not with gradients.
        softcap: where given, logits are softcap * tanh(scale q k^T / softcap) before key_bias and
            masks, as in Gemma 2 (arXiv:2408.00118); positive.

    Returns:
        out [B, Hq, L, Dv] in the dtype of q, and lse float32 [B, Hq, L]; 0 and -inf where a query
        sees no key. Differentiable in q, k, v and key_bias, once, through out and lse. Under
        autocast q, k and v are cast.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: rope_cos and rope_sin beside inputs that require grad.

    Complexity: 2 B Hq L K (D + Dv) flops; in decoding, one read of the listed keys and values for
    all query heads of a key head.
    """
    if block_q is None:
        check_tensor("q", q)
        check_tensor("indices", indices)
        check_dim("q", q, 4, "[B, Hq, L, D]")
        one_list = indices.dim() == 4 and known(indices.shape[2] == 1)
        block_q = larger(q.shape[2], 1) if one_list else 1
    return call(
        _ops.sparse_attention.default,
        q,
        k,
        v,
        indices,
        scale,
        broadcast_bias(key_bias),
        causal,
        broadcast_mask(mask),
        block_q,
        rope_cos,
        rope_sin,
        softcap,
    )


@torch.library.register_fake("tokred::sparse_attention")
def _sparse_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    block_q: int = 1,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(
        indices.dim() == 4, lambda: f"indices must be [B, H, lists, K], got {indices.dim()}-D"
    )
    torch._check(indices.shape[0] == q.shape[0], lambda: "indices must have the batch size of q")
    return fake_attention(q, k, v)


@torch.library.register_fake("tokred::sparse_attention_backward")
def _sparse_attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    key_bias: Tensor | None,
    causal: bool,
    mask: Tensor | None,
    block_q: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(q, k, v, key_bias)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, indices, ctx.scale, key_bias, ctx.causal, mask, ctx.block_q, *rotation, ctx.softcap = (
        inputs
    )
    if any(table is not None for table in rotation):
        refuse_history(
            "sparse_attention with rope_cos", ("q", "k", "v", "key_bias"), (q, k, v, key_bias)
        )
    ctx.save_for_backward(q, k, v, indices, key_bias, mask, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, indices, key_bias, mask, out, lse = ctx.saved_tensors
    grads = call(
        _ops.sparse_attention_backward.default,
        *incoming(grad_out, grad_lse),
        q,
        k,
        v,
        indices,
        out,
        lse,
        ctx.scale,
        key_bias,
        ctx.causal,
        mask,
        ctx.block_q,
        ctx.softcap,
    )
    grad_q, grad_k, grad_v, grad_bias = wanted(grads, q, k, v, key_bias)
    return grad_q, grad_k, grad_v, None, None, grad_bias, *[None] * 6


differentiable("sparse_attention", ("q", "k", "v", "key_bias"), _backward, _setup_context)
once_differentiable("sparse_attention_backward", "sparse_attention")
cast_under_autocast("sparse_attention", "q", "k", "v")
sharded("sparse_attention", f"{ATTENTION}, indices bhlk, rope_cos kr, rope_sin kr -> bhle, bhl")
sharded("sparse_attention_backward", f"{ATTENTION_GRADS}, indices bhlk -> bhld, bhnd, bhne, bhn")


@register_flop_formula(_ops.sparse_attention)
def _sparse_flops(q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes; skipped entries are counted."""
    return forward_flops(q, indices[3], v)


@register_flop_formula(_ops.sparse_attention_backward)
def _sparse_backward_flops(
    grad_out: Any, grad_lse: Any, q: Any, k: Any, v: Any, indices: Any, *args: Any, **kwargs: Any
) -> int:
    return backward_flops(q, indices[3], v)
