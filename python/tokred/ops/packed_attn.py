"""Attention and scores on packed keys and values: wrappers, fake kernels and flop counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._library import check_tensor
from .attention import broadcast_bias, broadcast_mask, forward_flops
from .kv_pack import PackedKV, check_bits, check_packed
from .placements import sharded
from .registration import call, cast_under_autocast, without_gradient
from .symbolic import check_dim

__all__ = ["packed_attention", "packed_qk_score"]

_ops = torch.ops.tokred


def packed_attention(
    q: Tensor,
    packed_k: PackedKV,
    packed_v: PackedKV,
    residual_k: Tensor | None = None,
    residual_v: Tensor | None = None,
    scale: float | None = None,
    indices: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    length: int | None = None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that reads packed keys and values as they are: no unpacked copy is ever written.

    Without length the tokens are the N packed ones, followed by the rows of the residuals; their
    numbers may differ between keys and values, their sum may not. With length the arguments are a
    cache as `kv_append` keeps it: packed tokens, and the last ones in the windows residual_k and
    residual_v.

    Tokens of three precisions (ARKV, arXiv:2603.08727) in one softmax: those in full precision are
    the residual, those of low precision are packed, those evicted are masked.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16; any outer strides, the last dimension
            contiguous.
        packed_k: [B, Hkv, N, D], Hq a multiple of Hkv. packed_v: [B, Hkv, N, Dv]; its bits,
            groups and scheme may be others, and both may share memory. Of latents (DeepSeek-V2,
            arXiv:2405.04434: a latent of 512, then 64 rotary channels) pass packed_k for both; the
            first channels of out are the sums of the latents.
        residual_k, residual_v: [B, Hkv, W, D | Dv] in the dtype of q; rotated where the packed
            tensor is (`kv_append` sees to it).
        scale: 1 / sqrt(D) where None.
        indices: int32 [B, Hq | Hkv | 1, L | 1, K]: attends to these tokens alone; others than
            0 .. T - 1 are skipped, and a token listed twice counts twice.
        mask: [B | 1, Hq | 1, L | 1, T], or [B, T]: bool, True is visible; or numbers that are
            added to the logits, in float32 or the dtype of q, of which -inf hides.
        key_bias: float32 [B | 1, Hkv | 1, T], or [B, T], added to the logits.
        causal: query i sees the tokens t <= i + T - L.
        length: tokens T in the cache.
        lengths: int32 [B], the tokens of each row of the batch, at most length.
        slots: int32 [B, capacity], where the packed tokens are in a pool [1, Hkv, S, ..] that all
            rows share.
        softcap: where given, logits are softcap * tanh(scale q k^T / softcap) before key_bias and
            masks, as in Gemma 2 (arXiv:2408.00118); positive.

    Returns:
        out [B, Hq, L, Dv] in the dtype of q, and lse float32 [B, Hq, L]; 0 and -inf where a query
        sees no token. As attention on the unpacked tensors, up to float32 rounding, except that
        the CPU multiplies codes of 1, 2, 4 or 8 bits, and levels, with float16 and bfloat16
        queries, and with the weights of a block of tokens, in sixteen-bit fixed point: channels are
        off by 2^-15 of the largest one of their group at most, and most of a query that is not
        rotated is exact. Under autocast q and the residuals are cast, as for attention.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.
        TypeError: packed_k or packed_v is no PackedKV.

    Complexity: 2 B Hq L T (D + Dv) flops (K in place of T with indices); in decoding, one read of
    the codes and params for all query heads of a key head.
    """
    check_packed("packed_k", packed_k)
    check_packed("packed_v", packed_v)
    return call(
        _ops.packed_attention.default,
        q,
        *packed_k.arguments(),
        *packed_v.arguments(),
        residual_k,
        residual_v,
        scale,
        indices,
        broadcast_mask(mask),
        broadcast_bias(key_bias),
        causal,
        length,
        lengths,
        slots,
        packed_k.levels,
        packed_v.levels,
        softcap,
    )


def packed_qk_score(
    q: Tensor,
    packed_k: PackedKV,
    residual_k: Tensor | None = None,
    reduce: str = "none",
    scale: float | None = None,
    length: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """`qk_score` on packed keys: what `topk` chooses from, before `packed_attention(indices=..)`.

    Args:
        q: [B, Hq, D] or [B, Hq, L, D], on CUDA D at most 256; packed_k, residual_k, length, lengths
            and slots as in `packed_attention`.
        reduce: "none", "group_mean", "group_max", "head_mean" or "softmax_vote"; see `qk_score`.
        scale: 1 / sqrt(D) where None.
        mask: bool [B | 1, T]; True is visible.

    Returns:
        float32 [B, Hq | Hkv | 1, T]; -inf (0 as a vote) for tokens that are hidden. As precise as
        the logits of `packed_attention`. Under autocast q and residual_k are cast.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.
        TypeError: packed_k is no PackedKV.

    Complexity: 2 B Hq T D flops, one read of the packed keys.
    """
    check_tensor("q", q)
    check_packed("packed_k", packed_k)
    if q.dim() == 3:
        q = q[:, :, None]
    return call(
        _ops.packed_qk_score.default,
        q,
        *packed_k.arguments(),
        residual_k,
        reduce,
        scale,
        length,
        lengths,
        mask,
        slots,
        packed_k.levels,
    )


def _tokens(
    codes: Tensor, residual: Tensor | None, length: int | None, slots: Tensor | None
) -> int:
    if length is not None:
        return length
    packed = codes.shape[2] if slots is None else slots.shape[1]
    return packed + (0 if residual is None else residual.shape[2])


@torch.library.register_fake("tokred::packed_attention")
def _packed_attention_fake(
    q: Tensor,
    k_codes: Tensor,
    k_params: Tensor,
    k_bits: int,
    k_group_size: int,
    k_axis: str,
    k_scheme: str,
    k_rotated: bool,
    v_codes: Tensor,
    v_params: Tensor,
    v_bits: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    torch._check(q.dim() == 4, lambda: f"q must be [B, Hq, L, D], got {q.dim()}-D")
    for name, codes in (("k_codes", k_codes), ("v_codes", v_codes)):
        torch._check(codes.dim() == 4, lambda name=name: f"{name} must be [B, Hkv, N, bytes]")
    check_bits("v_bits", v_bits)
    out = q.new_empty((*q.shape[:3], v_codes.shape[3] * 8 // v_bits))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("tokred::packed_qk_score")
def _packed_qk_score_fake(
    q: Tensor,
    codes: Tensor,
    params: Tensor,
    bits: int,
    group_size: int,
    axis: str,
    scheme: str,
    rotated: bool,
    residual: Tensor | None = None,
    reduce: str = "none",
    scale: float | None = None,
    length: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    torch._check(q.dim() == 4, lambda: f"q must be [B, Hq, L, D], got {q.dim()}-D")
    check_dim("codes", codes, 4, "[B, Hkv, N, bytes]")
    if slots is not None:
        check_dim("slots", slots, 2, "[B, capacity]")
    heads = {"none": q.shape[1], "group_mean": codes.shape[1], "group_max": codes.shape[1]}
    shape = (q.shape[0], heads.get(reduce, 1), _tokens(codes, residual, length, slots))
    return q.new_empty(shape, dtype=torch.float32)


without_gradient("packed_attention")
without_gradient("packed_qk_score")
cast_under_autocast("packed_attention", "q", "residual_k", "residual_v")
cast_under_autocast("packed_qk_score", "q", "residual")
sharded(
    "packed_attention",
    "q bhld, k_codes bhnd, k_params bhnp, v_codes bhne, v_params bhnp, "
    "residual_k bhwd, residual_v bhwe, indices bhlk, mask bhlt, key_bias bht, lengths b, "
    "slots bs, k_levels hi, v_levels hi -> bhle, bhl",
)
sharded(
    "packed_qk_score",
    "q bhld, codes bhnd, params bhnp, residual bhwd, lengths b, mask bt, "
    "slots bs, levels hi -> bht",
)


@register_flop_formula(_ops.packed_attention)
def _packed_attention_flops(q: Any, k_codes: Any, k_params: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes, and so do the tokens of a cache: its capacity is counted."""
    v_codes, v_bits = args[5], args[7]
    indices = kwargs.get("indices", args[15] if len(args) > 15 else None)
    pairs = indices[3] if indices is not None else k_codes[2]
    return forward_flops(q, pairs, (*v_codes[:3], v_codes[3] * 8 // v_bits))


@register_flop_formula(_ops.packed_qk_score)
def _packed_qk_score_flops(q: Any, codes: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of scores of the packed tokens. The queries are averaged first."""
    batch, heads, _, head_dim = q
    return 2 * batch * heads * codes[2] * head_dim
