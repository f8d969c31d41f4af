"""TaH: duo-causal attention, in which a token sees earlier positions of no later iteration.

Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models (arXiv 2511.08577).
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def duo_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_place: Tensor,
    key_place: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Key j is visible to query i where its position and its iteration are not later.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv]. Keys may lie in any order, such as
            all of one iteration before the next.
        query_place: i32 [B | 1, L, 2] and key_place: i32 [B | 1, N, 2], (position, iteration).
        valid: bool [B, N], False where a key does not count.

    Returns:
        out [B, Hq, L, Dv], lse f32 [B, Hq, L]. No L x N mask is made.
    """
    if valid is not None:
        never = torch.iinfo(torch.int32).max
        key_place = torch.where(valid[..., None], key_place, never)
    return tokred.biased_attention(
        q, k, v, scale=scale, query_position=query_place, key_position=key_place.contiguous()
    )


METHOD = Method(
    title="Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models",
    arxiv="2511.08577",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="a token sees earlier positions of no later iteration",
)
