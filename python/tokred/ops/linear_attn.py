"""Linear attention with decay and state, and its union with attention over chosen keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .attention import fake_attention, state_dtype
from .placements import QKV, sharded
from .registration import call, cast_under_autocast, differentiable, once_differentiable
from .sparse_attn import combine_states

__all__ = ["combine_linear", "linear_attention"]

_ops = torch.ops.tokred

CHUNK = 32  # rows that are multiplied with each other


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with exponential decay: memory and time per token do not grow with N.

    With s = decay of the head, S the state that comes in (0 where None) and i counting from 0,

        out_i = scale q_i (exp(-s (i + 1)) S + sum over j <= i of exp(-s (i - j)) k_j v_j^T)
        state = exp(-s N) S + sum over j of exp(-s (N - 1 - j)) k_j v_j^T

    so a sequence in pieces, each starting with the state of the one before, is the whole sequence;
    N = 1 is a step of decoding. Computed in chunks as Lightning Attention-2 does
    (arXiv:2401.04658), whose slopes are `decay`. There is no normaliser: append a column of ones to
    v to get the sum of the weights. Query head h reads key head h // (Hq // Hkv).

    For the keys older than a sliding window of w tokens alone, as a hybrid of both attentions needs
    them, pass k and v shifted by w rows, zeros in front.

    Args:
        q: [B, Hq, N, D] float32, float16 or bfloat16, or float64 on the CPU; any outer strides, the
            last dimension contiguous, D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
        decay: float32 (float64 if q is float64) [Hkv], the rate s of each key head; 0 forgets
            nothing.
        state: float32 (float64 if q is float64) [B, Hkv, D, Dv] from an earlier call.
        scale: of the queries.
        mask: bool [B | 1, N]. A token that is False is as if its key were not there: it adds
            nothing, whatever it holds, and no time passes at it, so padding on either side changes
            nothing. Its query is answered like any other.

    Returns:
        out [B, Hq, N, Dv] in the dtype of q, and state float32 [B, Hkv, D, Dv]. Differentiable in
        q, k, v and state, once: second derivatives raise a RuntimeError. Under autocast q, k and v
        are cast.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: decay requires grad.

    Complexity: O(B Hq N D Dv), memory O(B H D Dv) beside the results. Pieces that end at multiples
    of 32 tokens give the same bits as the whole sequence.
    """
    return call(_ops.linear_attention.default, q, k, v, decay, state, scale, mask)


def combine_linear(
    out: Tensor, lse: Tensor, linear_out: Tensor, mass: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over chosen keys and linear attention over the rest, as one attention.

    The weights of the chosen keys are exp(logit), those of the rest phi(q) phi(k) exp(shift), and

        (exp(lse) out + exp(shift) linear_out) / (exp(lse) + exp(shift) mass)

    is computed from their logarithms, so nothing overflows and a constant added to all logits, and
    so to lse and shift, changes nothing. STILL (arXiv:2602.02180) adds the linear part to softmax
    sums that are scaled by the largest logit of the row, so its result depends on that logit.

        out, lse = tokred.sparse_attention(q, k, v, chosen)
        ones = torch.ones_like(v[..., :1])
        sums, _ = tokred.linear_attention(phi_q, phi_k, torch.cat((v, ones), -1), decay, mask=rest)
        out, lse = combine_linear(out, lse, sums[..., :-1], sums[..., -1])

    A gate on the linear part, as STILL has, multiplies linear_out alone.

    Args:
        out: [B, H, L, Dv] float32, float16 or bfloat16, or float64 on the CPU. lse: float32
            [B, H, L]; both as the attention ops return them.
        linear_out: [B, H, L, Dv], the weighted sum of values, not divided by anything.
        mass: [B, H, L], the sum of the weights, not negative; 0 where there are none.
        shift: float32, broadcast to [B, H, L]: the logarithm of what was divided out of the
            features, such as the maxima that keep exponential features small. 0 where None.

    Returns:
        out and lse of the union, as `combine_states`. Not differentiable: inputs that require grad
        are refused.

    Complexity: three passes over the outputs.
    """
    wide = state_dtype(out)
    mass = mass.to(wide)
    linear = (linear_out.to(wide) / mass[..., None]).to(out.dtype)
    weight = mass.log()
    if shift is not None:
        weight = weight + shift
    return combine_states(out, lse, linear, weight)


@torch.library.register_fake("tokred::linear_attention")
def _linear_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, _ = fake_attention(q, k, v)
    torch._check(q.shape[2] == k.shape[2], lambda: "q and k must have the same tokens")
    torch._check(decay.dim() == 1, lambda: f"decay must be [Hkv], got {decay.dim()}-D")
    torch._check(decay.shape[0] == k.shape[1], lambda: "decay must have the heads of k")
    shape = (k.shape[0], k.shape[1], k.shape[3], v.shape[3])
    return out, q.new_empty(shape, dtype=state_dtype(q))


@torch.library.register_fake("tokred::linear_attention_backward")
def _linear_attention_backward_fake(
    grad_out: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor | None,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape))
    return *rows, grad_state.new_empty(grad_state.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, decay, state, ctx.scale, mask = inputs
    ctx.save_for_backward(q, k, v, decay, state, mask)


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, decay, state, mask = ctx.saved_tensors
    if grad_out.stride(-1) != 1:  # contiguous() returns an empty tensor as it is
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    grads = call(
        _ops.linear_attention_backward.default,
        grad_out,
        grad_state,
        q,
        k,
        v,
        decay,
        state,
        ctx.scale,
        mask,
    )
    pairs = zip(grads, (q, k, v, state), strict=True)
    grad_q, grad_k, grad_v, grad_initial = (
        grad if t is not None and t.requires_grad else None for grad, t in pairs
    )
    return grad_q, grad_k, grad_v, None, grad_initial, None, None


differentiable("linear_attention", ("q", "k", "v", "state"), _backward, _setup_context)
once_differentiable("linear_attention_backward", "linear_attention")
cast_under_autocast("linear_attention", "q", "k", "v")
sharded("linear_attention", f"{QKV}, decay h, state bhde, mask bn -> bhle, bhde")
sharded(
    "linear_attention_backward",
    f"grad_out bhle, grad_state bhde, {QKV}, decay h, state bhde, "
    "mask bn -> bhld, bhnd, bhne, bhde",
)


def _flops(q: Any, v: Any) -> int:
    """Flops of one pass: within chunks, with the state, and the sums of the state."""
    batch, heads, tokens, dim = q
    return 2 * batch * heads * tokens * (CHUNK * (dim + v[3]) // 2 + 2 * dim * v[3])


@register_flop_formula(_ops.linear_attention)
def _linear_attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes."""
    return _flops(q, v)


@register_flop_formula(_ops.linear_attention_backward)
def _linear_attention_backward_flops(
    grad_out: Any, grad_state: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any
) -> int:
    return 3 * _flops(q, v)
