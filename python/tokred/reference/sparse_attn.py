"""Attention over a chosen part, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "biased_attention",
    "block_sparse_attention",
    "combine_states",
    "sparse_attention",
    "unmerged_attention",
]


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
    """See tokred.biased_attention. Differentiable in q, k, v and key_bias."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    query = scale * q.to(dtype)
    key, value = (t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v))

    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    bias = query.new_zeros(())
    if mask is not None and mask.is_floating_point():
        bias, mask = mask.to(dtype), mask != -torch.inf
    if mask is not None:
        visible = visible & mask
    if query_position is not None and key_position is not None:
        ordered = key_position[:, None, None] <= query_position[:, None, :, None]
        visible = visible & ordered.all(-1)
    if key_bias is not None:
        of_keys = key_bias.to(dtype).expand(-1, k.shape[1], -1)
        of_keys = of_keys.repeat_interleave(group, dim=1)[:, :, None, :]
        visible = visible & (of_keys != -torch.inf)
        bias = of_keys + bias
    visible = visible.expand(*q.shape[:3], keys)

    nonfinite = _nonfinite_keys(key)
    logits = query @ key.index_fill(2, nonfinite, 0).transpose(-1, -2)
    if len(nonfinite):
        rows = _seen(key, visible, nonfinite)
        logits = logits.index_copy(3, nonfinite, (query[..., None, :] * rows).sum(-1))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits + bias).masked_fill(~visible, -torch.inf)

    # A row of -inf is computed as a row of zeros, and its results replaced at the end.
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0).softmax(-1)
    nonfinite = _nonfinite_keys(value)
    out = weights @ value.index_fill(2, nonfinite, 0)
    if len(nonfinite):
        rows = _seen(value, logits != -torch.inf, nonfinite)
        out = out + (weights[..., nonfinite, None] * rows).sum(-2)
    lse = logits.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return out.masked_fill(empty, 0).to(q.dtype), lse


def _nonfinite_keys(rows: Tensor) -> Tensor:
    """The keys of [B, H, N, C] that hold NaN or an infinity: 0 times them is not 0."""
    return rows.detach().isfinite().logical_not().any(-1).flatten(0, 1).any(0).nonzero()[:, 0]


def _seen(rows: Tensor, visible: Tensor, keys: Tensor) -> Tensor:
    """These keys as every query sees them, [B, H, L, keys, C]: 0 where it does not."""
    return rows[:, :, None, keys].where(visible[..., keys, None], 0)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_q: int,
    block_k: int,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.block_sparse_attention. Differentiable in q, k, v and key_bias."""
    query_block = torch.arange(q.shape[2], device=q.device) // block_q
    key_block = torch.arange(k.shape[2], device=k.device) // block_k
    visible = block_mask[:, :, query_block][..., key_block]
    mask = hide_pairs(mask, visible)
    return biased_attention(q, k, v, key_bias, causal, scale, mask, softcap=softcap)


def hide_pairs(mask: Tensor | None, visible: Tensor) -> Tensor:
    """A mask, bool or of numbers to add, that hides other pairs as well."""
    if mask is None:
        return visible
    return mask.where(visible, -torch.inf if mask.is_floating_point() else False)


def sparse_attention(
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
    """See tokred.sparse_attention. Differentiable in q, k, v and key_bias."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale

    def per_query_head(t: Tensor) -> Tensor:
        return t.expand(batch, -1, *t.shape[2:]).repeat_interleave(heads // t.shape[1], dim=1)

    lists = per_query_head(indices.long())
    lists = lists.repeat_interleave(min(block_q, max(queries, 1)), dim=2)[:, :, :queries]
    # Whatever is hidden points at a key of zeros behind the last.
    visible = (lists >= 0) & (lists < keys)
    if causal:
        last = torch.arange(queries, device=q.device) + keys - queries
        visible = visible & (lists <= last[:, None])
    lists = lists.where(visible, keys)
    pair_bias = None
    if mask is not None:
        padded = torch.nn.functional.pad(mask.expand(batch, heads, queries, keys), (0, 1))
        mask = padded.gather(3, lists)
        if mask.is_floating_point():
            pair_bias, mask = mask.to(dtype), mask != -torch.inf
        visible = visible & mask

    def listed(t: Tensor) -> Tensor:
        """[B, Hkv | 1, N, C] to [B, Hq, L, K, C]."""
        rows = torch.nn.functional.pad(per_query_head(t.to(dtype)), (0, 0, 0, 1))
        at = lists.flatten(2)[..., None].expand(-1, -1, -1, t.shape[3])
        return rows.gather(2, at).unflatten(2, lists.shape[2:])

    if key_bias is not None:
        bias = listed(key_bias[..., None])[..., 0]
        visible = visible & (bias != -torch.inf)
    lists = lists.where(visible, keys)
    k_listed, v_listed = listed(k), listed(v)
    if rope_cos is not None and rope_sin is not None:
        cos, sin = (t[: lists.shape[3]].to(dtype) for t in (rope_cos, rope_sin))
        left, right = k_listed.chunk(2, dim=-1)
        k_listed = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    logits = scale * (k_listed @ q.to(dtype)[..., None])[..., 0]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if key_bias is not None:
        logits = logits + bias
    if pair_bias is not None:
        logits = logits + pair_bias
    logits = logits.masked_fill(~visible, -torch.inf)

    empty = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    if lists.shape[3] == 0:
        lse = logits.new_full(lists.shape[:3], -torch.inf)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    out = (logits.softmax(-1)[..., None, :] @ v_listed)[..., 0, :].masked_fill(empty, 0)
    lse = logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return out.to(q.dtype), lse


def combine_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """See tokred.combine_states."""
    largest = torch.maximum(lse_a, lse_b)
    base = largest.masked_fill(largest == -torch.inf, 0)
    weights = [(lse - base).exp()[..., None] for lse in (lse_a, lse_b)]
    total = weights[0] + weights[1]
    parts = zip(weights, (out_a, out_b), strict=True)
    out = sum((w * x.to(w.dtype)).masked_fill(w == 0, 0) for w, x in parts) / total
    return out.masked_fill(total == 0, 0).to(out_a.dtype), base + total[..., 0].log()


def unmerged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_map: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    query_map: Tensor | None = None,
) -> Tensor:
    """See tokred.unmerged_attention: expanded, rotated, attended, averaged. Differentiable."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    maps = token_map if query_map is None else query_map
    positions, queries = token_map.shape[1], maps.shape[1]

    def expanded(t: Tensor, to: Tensor) -> Tensor:
        """[B, H, tokens, C] to [B, H, positions, C], zeros where there is none."""
        padded = torch.nn.functional.pad(t.to(dtype), (0, 0, 0, 1))
        rows = to.where((to >= 0) & (to < t.shape[2]), t.shape[2]).long()
        shape = (t.shape[0], t.shape[1], to.shape[1], t.shape[3])
        return padded.gather(2, rows[:, None, :, None].expand(shape))

    def rotated(t: Tensor, first: int) -> Tensor:
        if rope_cos is None or rope_sin is None:
            return t
        cos, sin = (table[:, None, first:].to(dtype) for table in (rope_cos, rope_sin))
        width = rope_cos.shape[2]
        left, right = t[..., :width], t[..., width : 2 * width]
        halves = (left * cos - right * sin, right * cos + left * sin)
        return torch.cat((*halves, t[..., 2 * width :]), -1)

    present = (token_map >= 0) & (token_map < k.shape[2])
    rows = rotated(expanded(q, maps), positions - queries)
    keys = rotated(expanded(k, token_map), 0)
    attended, _ = biased_attention(
        rows, keys, expanded(v, token_map), None, causal,
        q.shape[3] ** -0.5 if scale is None else scale, present[:, None, None],
    )  # fmt: skip
    belongs = (maps[..., None] == torch.arange(q.shape[2], device=q.device)).to(dtype)
    share = belongs / belongs.sum(1, keepdim=True).clamp(min=1)
    mine = share.mT[:, None]
    spread = torch.where(mine[..., None] == 0, 0, mine[..., None] * attended[:, :, None])
    return spread.sum(3).to(q.dtype)
