"""Attention over a chosen part, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.biased_attention. Differentiable in q, k, v and key_bias."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    per_query_head = [t.to(dtype).repeat_interleave(group, dim=1) for t in (k, v)]

    logits = scale * q.to(dtype) @ per_query_head[0].transpose(-1, -2)
    if key_bias is not None:
        bias = key_bias.to(dtype).expand(-1, k.shape[1], -1)
        logits = logits + bias.repeat_interleave(group, dim=1)[:, :, None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    if mask is not None:
        visible = visible & mask
    logits = logits.masked_fill(~visible, -torch.inf)

    # A row of -inf is computed as a row of zeros, and its results replaced at the end.
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(empty, 0)
    out = (logits.softmax(-1) @ per_query_head[1]).masked_fill(empty, 0)
    lse = logits.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return out.to(q.dtype), lse
