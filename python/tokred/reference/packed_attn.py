"""Attention and scores on packed keys and values, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokred.ops.kv_pack import PackedKV, packed_tokens

from .kv_pack import hadamard, kv_unpack
from .score import qk_score
from .sparse_attn import biased_attention, hide_pairs, sparse_attention

__all__ = ["packed_attention", "packed_qk_score"]


def _unpacked(
    packed: PackedKV,
    residual: Tensor | None,
    dtype: torch.dtype,
    batch: int,
    length: int | None,
    lengths: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The tokens [B, Hkv, T, D] of a side, and which exist and have a place [B, T]."""
    form = packed.format
    rows = kv_unpack(packed, dtype)
    window = rows[:, :, :0].expand(batch, -1, -1, -1) if residual is None else residual.to(dtype)
    if residual is not None and form.rotated:
        window = hadamard(window)
    if slots is not None:
        placed = (slots >= 0) & (slots < packed.num_tokens)
        pool = pad(rows[0], (0, 0, 0, 1))
        rows = pool[:, torch.where(placed, slots, packed.num_tokens).long()].transpose(0, 1)
    else:
        placed = torch.ones(batch, packed.num_tokens, dtype=torch.bool, device=rows.device)
    if length is None:
        exists = placed.new_ones(batch, window.shape[2])
        return torch.cat([rows, window], 2), torch.cat([placed, exists], 1)

    size = window.shape[2]
    tokens = rows.new_zeros(batch, rows.shape[1], length, rows.shape[3])
    exists = placed.new_zeros(batch, length)
    for item in range(batch):
        held = length if lengths is None else min(max(int(lengths[item]), 0), length)
        first = packed_tokens(form.axis, size, held)
        tokens[item, :, :first] = rows[item, :, :first]
        exists[item, :first] = placed[item, :first]
        exists[item, first:held] = True
        if size > 0:
            row = torch.arange(first, held, device=rows.device) % size
            tokens[item, :, first:held] = window[item, :, row]
    return tokens, exists


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
    """See tokred.packed_attention."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    cache = (q.shape[0], length, lengths, slots)
    k, k_exists = _unpacked(packed_k, residual_k, dtype, *cache)
    v, v_exists = _unpacked(packed_v, residual_v, dtype, *cache)
    exists = k_exists & v_exists
    visible = exists[:, None, None]
    queries, tokens = q.shape[2], k.shape[2]
    if causal:
        held = torch.full((q.shape[0], 1), tokens, device=q.device)
        if lengths is not None:
            held = lengths.clamp(0, tokens)[:, None]
        last = torch.arange(queries, device=q.device) + held - queries
        token = torch.arange(tokens, device=q.device)
        visible = visible & (token <= last[..., None])[:, None]
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    if key_bias is not None and key_bias.dim() == 2:
        key_bias = key_bias[:, None]
    k, v = (t.masked_fill(~exists[:, None, :, None], 0) for t in (k, v))
    query = q.to(dtype)
    if indices is None:
        mask = hide_pairs(mask, visible)
        out, lse = biased_attention(query, k, v, key_bias, False, scale, mask, softcap=softcap)
    else:
        block_q = max(queries, 1) if indices.shape[2] == 1 else 1
        mask = hide_pairs(mask, visible.expand(q.shape[0], q.shape[1], queries, tokens))
        out, lse = sparse_attention(
            query, k, v, indices, scale, key_bias, mask=mask, block_q=block_q, softcap=softcap
        )
    return out.to(q.dtype), lse


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
    """See tokred.packed_qk_score."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, exists = _unpacked(packed_k, residual_k, dtype, q.shape[0], length, lengths, slots)
    k = k.masked_fill(~exists[:, None, :, None], 0)
    visible = exists if mask is None else exists & mask
    return qk_score(q.to(dtype), k, reduce, None, scale, None, visible)
