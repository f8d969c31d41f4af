"""Attention written out in torch, and random inputs: what the transcriptions share."""

from __future__ import annotations

import torch
from torch import Tensor


def heads(
    queries: int = 1,
    keys: int = 200,
    groups: tuple[int, int] = (6, 2),
    dim: int = 16,
    batch: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, L, D], k and v [B, Hkv, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    heads_q, heads_kv = groups
    q = torch.randn(batch, heads_q, queries, dim, generator=generator)
    k, v = torch.randn(2, batch, heads_kv, keys, dim, generator=generator)
    return q, k, v


def repeat(x: Tensor, q: Tensor) -> Tensor:
    """Every key head as often as query heads read it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def logits(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """f64 [B, Hq, L, N]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * q.double() @ repeat(k, q).double().transpose(-1, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax over the visible keys, bool [.., L, N]."""
    scores = logits(q, k)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ repeat(v, q).double()).float()


def listed(indices: Tensor, keys: int) -> Tensor:
    """bool [.., keys]: which keys a list names; fails on a key named twice."""
    visible = torch.zeros(*indices.shape[:-1], keys + 1)
    named = torch.where(indices < 0, keys, indices).long()
    visible = visible.scatter_add(-1, named, torch.ones(indices.shape))[..., :keys]
    assert (visible <= 1).all()
    return visible.bool()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
