"""Attention over a chosen part: wrapper, fake kernels, gradients, autocast and flop counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._library import call

_ops = torch.ops.tokred


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with a per-key log-weight: softmax(scale q k^T + key_bias) v, tile by tile.

    With key_bias = log(size) it is ToMe's proportional attention (arXiv:2210.09461), equal to
    attention in which every key stands `size` times. Logits and sums are float32 (float64 for
    float64) and never stored, as in FlashAttention (arXiv:2205.14135). Query head h reads key head
    h // (Hq // Hkv).

    Args:
        q: [B, Hq, L, D] float32, float16, bfloat16, or float64 on the CPU; any outer strides, the
            last dimension contiguous, D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
        key_bias: float32 (float64 beside float64 q) [B | 1, Hkv | 1, N], or [B, N]; -inf hides a
            key.
        causal: query i sees the keys j <= i + N - L: the last query sees them all.
        scale: 1 / sqrt(D) where None.
        mask: bool [B | 1, Hq | 1, L | 1, N], or [B, N]; True is visible.

    Returns:
        out [B, Hq, L, Dv] in the dtype of q, and lse float32 [B, Hq, L], the log of the sum of the
        exponentials. A query that sees no key has out 0 and lse -inf. Differentiable in q, k, v and
        key_bias, through out and lse. Under autocast q, k and v are cast, key_bias is not.

    Raises:
        RuntimeError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B Hq L N (D + Dv) flops, memory linear in L and N.
    """
    if key_bias is not None and key_bias.dim() == 2:
        key_bias = key_bias[:, None]
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    return call(_ops.biased_attention.default, q, k, v, key_bias, causal, scale, mask)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tokred::biased_attention")
def _biased_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        torch._check(tensor.dim() == 4, lambda name=name: f"{name} must be [B, H, N, D]")
        torch._check(tensor.shape[0] == q.shape[0], lambda: "q, k and v must have one batch size")
    torch._check(k.shape[3] == q.shape[3], lambda: "k must have the head dimension of q")
    torch._check(v.shape[1] == k.shape[1], lambda: "v must have the heads of k")
    torch._check(v.shape[2] == k.shape[2], lambda: "v must have the keys of k")
    torch._check(q.shape[1] % k.shape[1] == 0, lambda: "the heads of q must be a multiple of k's")
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=_state_dtype(q))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (0,) if key_bias is None else k.shape[:3]
    grad_bias = q.new_empty(bias_shape, dtype=_state_dtype(q))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_bias, ctx.causal, ctx.scale, mask = inputs
    ctx.save_for_backward(q, k, v, key_bias, mask, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, key_bias, mask, out, lse = ctx.saved_tensors
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    *grads, grad_bias = _ops.biased_attention_backward.default(
        grad_out, grad_lse.contiguous(), q, k, v, key_bias, out, lse, ctx.causal, ctx.scale, mask
    )
    if key_bias is not None:
        grads.append(grad_bias.sum_to_size(key_bias.shape))
    else:
        grads.append(None)
    wanted = [t is not None and t.requires_grad for t in (q, k, v, key_bias)]
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None


def _register_autocast(device: str) -> None:
    """Casts q, k and v as torch does for its own attention, and leaves key_bias in float32."""
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if q.dtype != torch.float64:
                q, k, v = (t.to(dtype) for t in (q, k, v))
            return _ops.biased_attention.default(q, k, v, key_bias, causal, scale, mask)

    _ops.biased_attention.default.py_impl(key)(kernel)
    _autocast_library.impl("biased_attention", kernel, key.name)


torch.library.register_autograd("tokred::biased_attention", _backward, setup_context=_setup_context)
_autocast_library = torch.library.Library("tokred", "IMPL")
for _device in ("cpu", "cuda"):
    _register_autocast(_device)


@register_flop_formula(_ops.biased_attention)
def _attention_flops(q, k, v, *args, **kwargs) -> int:
    """Tensors arrive as their shapes; masked and causal pairs are counted, as torch counts SDPA."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * k[2] * (head_dim + v[3])


@register_flop_formula(_ops.biased_attention_backward)
def _attention_backward_flops(grad_out, grad_lse, q, k, v, *args, **kwargs) -> int:
    """The logits again, then the gradients of p, v, q and k."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * k[2] * (3 * head_dim + 2 * v[3])
