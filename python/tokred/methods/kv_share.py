"""KVShare, approximate: reuse another request's cache, recompute the tokens that deviate most.

KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse (arXiv
2503.16525). As published, a few tokens of high deviation are recomputed. Different: the published
deviation is weighted by attention, by a formula that is not followed here, and chooses tokens again
while decoding; here it is the relative distance of one early layer's fresh keys and values to the
reused ones, once. The published share is not known either: share is an argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


def deviation(fresh: list[Tensor], reused: list[Tensor]) -> Tensor:
    """f32 [B, N]: |fresh - reused| / |reused| of every token, summed over keys and values.

    Args:
        fresh, reused: tensors [B, H, N, D] of one layer, such as [k, v].
    """
    total: Any = 0.0
    for new, old in zip(fresh, reused, strict=True):
        tokens = [t.float().transpose(1, 2).flatten(2) for t in (new, old)]
        distance, _ = tokred.transition_stats(tokens[1], tokens[0] - tokens[1])
        total = total + distance
    return total


def choose_tokens(deviations: Tensor, share: float = 0.15, num_locals: int = 1) -> Tensor:
    """i32 [B, max(int(share * N), num_locals)] by position: what to recompute.

    The last num_locals tokens, which the first new token depends on, are always among them.

    Raises:
        ValueError: a share outside [0, 1], or num_locals below 0.
    """
    check_minimum(0, num_locals=num_locals)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    tokens = deviations.shape[1]
    count = min(max(int(share * tokens), num_locals), tokens)
    return tokred.topk(deviations, count, order="position", num_locals=num_locals)[1]


def recompute_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of scattered queries to the whole cache.

    Args:
        q: [B, Hq, M, D], the recomputed tokens; k, v: [B, Hkv, N, ..], already updated.
        positions: i32 [B, M], where the queries stand; query i sees the keys up to positions[i].

    Returns:
        out [B, Hq, M, Dv], lse f32 [B, Hq, M]; a query at position -1 gets 0 and -inf.
    """
    keys = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
    return tokred.biased_attention(
        q, k, v, scale=scale, query_position=positions[..., None],
        key_position=keys[None, :, None],
    )  # fmt: skip


def write_back(cache: Tensor, rows: Tensor, positions: Tensor) -> None:
    """cache[b, :, positions[b, i]] = rows[b, :, i], in place; position -1 writes nothing.

    Args:
        cache: [B, H, N, D]; rows: [B, H, M, D]; positions: i32 [B, M].
    """
    batch, token = (positions >= 0).nonzero(as_tuple=True)
    cache[batch, :, positions[batch, token].long()] = rows[batch, :, token]


METHOD = Method(
    title="KVShare: An LLM Service System with Efficient and Effective Multi-Tenant KV Cache Reuse",
    arxiv="2503.16525",
    family=Family.REUSE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="reuse another request's cache, recompute the tokens that deviate most",
)
