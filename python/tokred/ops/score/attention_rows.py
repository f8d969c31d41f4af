"""Importance from attention that is never stored: rows, columns and PageRank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor
from ..attention import broadcast_mask
from ..placements import sharded
from ..registration import call, cast_under_autocast, without_gradient
from ..sparse_attn import biased_attention

_ops = torch.ops.tokred


def attention_rows(
    q: Tensor,
    k: Tensor,
    softmax: bool = True,
    denominator: tuple[int, int | None] | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The attention weights, or the logits, of a few queries: those of [CLS], or the last ones.

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, the last dimension contiguous, D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv.
        softmax: False for the logits scale q . k, -inf where hidden.
        denominator: (first, last): the keys whose exponentials are summed, last excluded and N
            where None. All keys get their quotient, so those outside may exceed 1. Default: all.
        causal: query i sees the keys j <= i + N - L.
        scale: 1 / sqrt(D) where None.
        mask: bool [B | 1, Hq | 1, L | 1, N], or [B, N]; True is visible.

    Returns:
        float32 [B, Hq, L, N]; with softmax, 0 where hidden and where no key of the denominator is
        visible. Under autocast q and k are cast, as for attention.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Hq L N D flops, O(B Hq L N) memory: the result.
    """
    if denominator is not None and not (isinstance(denominator, tuple) and len(denominator) == 2):
        raise TypeError(f"denominator must be (first, last), got {denominator!r}")
    first, last = (0, None) if denominator is None else denominator
    return call(
        _ops.attention_rows.default, q, k, softmax, first, last, causal, scale, broadcast_mask(mask)
    )


def attention_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    reduce: str = "sum",
    weight: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How much attention every key receives: column statistics of a matrix that is never stored.

    With p(i, j) the attention weight of query i on key j, 0 where hidden, the result is the sum,
    mean, max or (unbiased) variance over all L queries i of weight[i] p(i, j). The sum of a key is
    the heavy-hitter score of H2O (arXiv:2306.14048); with a window of late queries, SnapKV's
    (arXiv:2404.14469).

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, the last dimension contiguous, D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv.
        lse: float32 [B, Hq, L], as `biased_attention` returns it for these q, k, causal, scale and
            mask; computed here, in another pass over k, where None.
        reduce: "sum", "mean" (by L), "max" or "variance" (0 where L is 1).
        weight: float32 [B | 1, Hq | 1, L]; 1 where None.
        causal, scale, mask: as in `biased_attention`.

    Returns:
        float32 [B, Hq, N]. Under autocast q and k are cast, as for attention.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Hq L N D flops (twice that without lse), memory linear in L and N.
    """
    lse = _log_sum(q, k, causal, scale, mask) if lse is None else lse
    return call(
        _ops.attention_columns.default,
        q,
        k,
        lse,
        reduce,
        weight,
        causal,
        scale,
        broadcast_mask(mask),
    )


def pagerank(
    q: Tensor,
    k: Tensor,
    iterations: int = 5,
    damping: float = 0.0,
    start: Tensor | None = None,
    lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Importance by power iteration on each head's attention matrix P, which is never stored.

    s <- (1 - damping) s P + damping / N, as often as asked. Zero-TPrune (arXiv:2305.17328) ranks a
    vision transformer's tokens so, AIM (arXiv:2412.03248) a language model's.

    Args:
        q: [B, Hq, N, D] float32, float16 or bfloat16, the last dimension contiguous, D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv.
        iterations: at least 1. damping: in [0, 1].
        start: float32 [B | 1, Hq | 1, N]; 1 / N where None.
        lse, causal, scale, mask: as in `attention_columns`.

    Returns:
        float32 [B, Hq, N]. Under autocast q and k are cast, as for attention.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Hq N^2 D flops an iteration, memory linear in N.
    """
    lse = _log_sum(q, k, causal, scale, mask) if lse is None else lse
    return call(
        _ops.pagerank.default,
        q,
        k,
        lse,
        iterations,
        damping,
        start,
        causal,
        scale,
        broadcast_mask(mask),
    )


def _log_sum(
    q: Tensor, k: Tensor, causal: bool, scale: float | None, mask: Tensor | None
) -> Tensor:
    """The lse of the attention; biased_attention needs values, of which one channel is enough."""
    check_tensor("k", k)
    with torch.no_grad():
        return biased_attention(q, k, k[..., :1], causal=causal, scale=scale, mask=mask)[1]


def _check_heads(q: Tensor, k: Tensor) -> None:
    torch._check(q.dim() == 4, lambda: f"q must be [B, Hq, L, D], got {q.dim()}-D")
    torch._check(k.dim() == 4, lambda: f"k must be [B, Hkv, N, D], got {k.dim()}-D")
    torch._check(k.shape[0] == q.shape[0], lambda: "k must have the batch size of q")
    torch._check(k.shape[3] == q.shape[3], lambda: "k must have the head dimension of q")


@torch.library.register_fake("tokred::attention_rows")
def _attention_rows_fake(
    q: Tensor,
    k: Tensor,
    softmax: bool = True,
    first: int = 0,
    last: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    _check_heads(q, k)
    return q.new_empty((*q.shape[:3], k.shape[2]), dtype=torch.float32)


@torch.library.register_fake("tokred::attention_columns")
def _attention_columns_fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    reduce: str = "sum",
    weight: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    _check_heads(q, k)
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


@torch.library.register_fake("tokred::pagerank")
def _pagerank_fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    iterations: int,
    damping: float = 0.0,
    start: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    _check_heads(q, k)
    torch._check(q.shape[2] == k.shape[2], lambda: "q must have the tokens of k")
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


for _name in ("attention_rows", "attention_columns", "pagerank"):
    without_gradient(_name)
    cast_under_autocast(_name, "q", "k")

sharded("attention_rows", "q bhld, k bhnd, mask bhln -> bhln")
sharded("attention_columns", "q bhld, k bhnd, lse bhl, weight bhl, mask bhln -> bhn")
sharded("pagerank", "q bhnd, k bhnd, lse bhn, start bhn, mask bhnn -> bhn")


@register_flop_formula([_ops.attention_rows, _ops.attention_columns])
def _logit_flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes; hidden pairs are counted."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * k[2] * head_dim


@register_flop_formula(_ops.pagerank)
def _pagerank_flops(q: Any, k: Any, lse: Any, iterations: Any, *args: Any, **kwargs: Any) -> int:
    return iterations * _logit_flops(q, k)
