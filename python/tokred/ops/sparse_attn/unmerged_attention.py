"""Attention over positions that share tokens: virtual token unmerging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..attention import fake_attention
from ..placements import QKV, sharded
from ..registration import call, cast_under_autocast, without_gradient

_ops = torch.ops.tokred


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
    """Attention of merged tokens as if they were not merged: DyMU's virtual token unmerging.

    Every position of the sequence has the query, key and value of its token, rotated to the
    position, and a token gets the mean of what its positions attend to (arXiv:2504.17040). It is
    the same as expanding q, k and v by the map, rotating, attending and averaging, but nothing is
    expanded: rows are read through the map and rotated where they are used, and the weights of keys
    of one token are added before they are multiplied with its value.

    Args:
        q: [B, Hq, Mq, D] float32, float16 or bfloat16, before rotation; any outer strides, the last
            dimension contiguous, D at most 256.
        k: [B, Hkv, M, D], Hq a multiple of Hkv, before rotation. v: [B, Hkv, M, Dv].
        token_map: int32 [B, N], the token of k and v at each position; -1, or any number outside
            [0, M), where there is none.
        rope_cos, rope_sin: float32 [B | 1, N, R], R at most D / 2, of the angles of each position;
            dimension d is rotated with d + R, as transformers does. Nothing is rotated where None.
        causal: a position sees those up to itself.
        scale: 1 / sqrt(D) where None.
        query_map: int32 [B, L], the token of q at each of the last L positions; token_map where
            None. So a chunk of new queries attends to all keys.

    Returns:
        [B, Hq, Mq, Dv] in the dtype of q; 0 for a token without positions, and the mean counts 0
        for a position that sees nothing. Not differentiable: inputs that require grad are refused.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Hq L N D flops for the logits, half of it seen if causal, and on the CPU
    2 B Hq Mq M Dv for the values. Memory beside the result: on the CPU for each thread a table of
    at most N (D + Dv) weights, less than one expanded head, and M for each of 64 queries; on CUDA
    a row of Dv for each query and head, in float32.
    """
    return call(
        _ops.unmerged_attention.default,
        q,
        k,
        v,
        token_map,
        rope_cos,
        rope_sin,
        causal,
        scale,
        query_map,
    )


@torch.library.register_fake("tokred::unmerged_attention")
def _unmerged_attention_fake(
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
    for name, maps in (("token_map", token_map), ("query_map", query_map)):
        if maps is not None:
            torch._check(maps.dim() == 2, lambda name=name: f"{name} must be 2-D")
            torch._check(
                maps.shape[0] == q.shape[0], lambda name=name: f"{name} must have the batch of q"
            )
    return fake_attention(q, k, v)[0]


without_gradient("unmerged_attention")
cast_under_autocast("unmerged_attention", "q", "k", "v")
sharded(
    "unmerged_attention", f"{QKV}, token_map bt, rope_cos btr, rope_sin btr, query_map bl -> bhle"
)


@register_flop_formula(_ops.unmerged_attention)
def _unmerged_attention_flops(
    q: Any, k: Any, v: Any, token_map: Any, *args: Any, **kwargs: Any
) -> int:
    """Tensors arrive as their shapes; causal pairs are counted, as torch counts SDPA."""
    batch, heads, tokens, dim = q
    positions = token_map[1]
    query_map = args[4] if len(args) > 4 else None
    queries = positions if query_map is None else query_map[1]
    return 2 * batch * heads * (queries * positions * dim + tokens * k[2] * v[3])
