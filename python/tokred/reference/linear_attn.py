"""Linear attention with decay and state, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.linear_attention: its recurrence, token by token. Differentiable in all floats."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (batch, heads_kv, tokens, dim), group = k.shape, q.shape[1] // k.shape[1]
    query = (scale * q.to(dtype)).unflatten(1, (heads_kv, group))
    key, value = k.to(dtype), v.to(dtype)
    shape = (batch, heads_kv, dim, v.shape[3])
    current = q.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)
    factor = (-decay.to(dtype)).exp()[:, None, None]
    outs = []
    for i in range(tokens):
        following = factor * current + key[:, :, i, :, None] * value[:, :, i, None]
        if mask is not None:
            following = following.where(mask[:, i, None, None, None], current)
        current = following
        outs.append(query[:, :, :, i] @ current)
    out = torch.stack(outs, 3) if outs else query.new_zeros(batch, heads_kv, group, 0, v.shape[3])
    return out.flatten(1, 2).to(q.dtype), current.clone() if current is state else current
