"""Shared by the attention ops: broadcasting, fake results, gradients and flop counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import check_tensor


def broadcast_bias(key_bias: Tensor | None) -> Tensor | None:
    """A key bias [B, N] as [B, 1, N]; others as they are."""
    if key_bias is None:
        return None
    check_tensor("key_bias", key_bias)
    return key_bias[:, None] if key_bias.dim() == 2 else key_bias


def broadcast_mask(mask: Tensor | None) -> Tensor | None:
    """A key mask [B, N] as [B, 1, 1, N]; others as they are."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    return mask[:, None, None] if mask.dim() == 2 else mask


def state_dtype(q: Tensor) -> torch.dtype:
    """The dtype of lse and of the key bias."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def fake_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Checks the shapes of an attention call, and makes its out and lse."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        torch._check(tensor.dim() == 4, lambda name=name: f"{name} must be [B, H, N, D]")
        torch._check(tensor.shape[0] == q.shape[0], lambda: "q, k and v must have one batch size")
    torch._check(k.shape[3] == q.shape[3], lambda: "k must have the head dimension of q")
    torch._check(v.shape[1] == k.shape[1], lambda: "v must have the heads of k")
    torch._check(v.shape[2] == k.shape[2], lambda: "v must have the keys of k")
    torch._check(
        k.shape[1] > 0 and q.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        lambda: (
            "the heads of q must be a multiple of the heads of k, and at least one, got "
            f"{q.shape[1]} and {k.shape[1]}"
        ),
    )
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=state_dtype(q))


def fake_gradients(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every backward op of attention returns; an absent bias has an empty gradient."""
    bias_shape = (0,) if key_bias is None else k.shape[:3]
    grad_bias = q.new_empty(bias_shape, dtype=state_dtype(q))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), grad_bias


def incoming(grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the results, laid out as the backward ops take them."""
    if grad_out.stride(-1) != 1:  # contiguous() returns an empty tensor as it is
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    return grad_out, grad_lse.contiguous()


def wanted(
    grads: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and key_bias that autograd asks for."""
    grad_q, grad_k, grad_v, grad_bias = grads
    if key_bias is not None:
        # The ops return a gradient [0] for a bias without elements.
        whole = grad_bias.dim() == 3
        grad_bias = grad_bias.sum_to_size(key_bias.shape) if whole else torch.zeros_like(key_bias)
    pairs = ((grad_q, q), (grad_k, k), (grad_v, v), (grad_bias, key_bias))
    return tuple(g if t is not None and t.requires_grad else None for g, t in pairs)


def forward_flops(q: Sequence[int], pairs: int, v: Sequence[int]) -> int:
    """Flops of logits and weighted sums, for queries of that shape with `pairs` keys each."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * pairs * (head_dim + v[3])


def backward_flops(q: Sequence[int], pairs: int, v: Sequence[int]) -> int:
    """Flops of the logits again, and of the gradients of p, v, q and k."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * pairs * (3 * head_dim + 2 * v[3])
