"""Gated attention: a sigmoid gate on what attention gives, before the output projection.

Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free
(NeurIPS 2025, arXiv 2505.06708).
"""

from __future__ import annotations

from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def split_gate(
    projected: Tensor, num_kv_heads: int, group: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Queries and gates out of one projection.

    Args:
        projected: [B, L, Hkv * (G * D + gates)], per key head the G queries, then G gates (one a
            head) or G * D gates (one an element).

    Returns:
        q [B, Hq, L, D] and gate [B, L, Hq, 1 | D].

    Raises:
        ValueError: the last dimension is neither.
    """
    per_head = projected.unflatten(-1, (num_kv_heads, -1))
    gates = per_head.shape[-1] - group * head_dim
    if gates not in (group, group * head_dim):
        raise ValueError(
            f"projected must hold {group} or {group * head_dim} gates a key head besides the "
            f"{group * head_dim} query numbers, got {gates}"
        )
    query, gate = per_head.split((group * head_dim, gates), dim=-1)
    query = query.unflatten(-1, (group, head_dim)).flatten(2, 3)
    gate = gate.unflatten(-1, (group, gates // group)).flatten(2, 3)
    return query.transpose(1, 2), gate


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T) v * sigmoid(gate).

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        gate: [B, L, Hq, 1 | Dv], before the sigmoid.

    Returns:
        [B, L, Hq, Dv]. Differentiable.
    """
    out, _ = tokred.biased_attention(q, k, v, causal=causal, scale=scale, mask=mask)
    return out.transpose(1, 2) * gate.sigmoid()


METHOD = Method(
    title=(
        "Gated Attention for Large Language Models: Non-linearity, Sparsity, and "
        "Attention-Sink-Free"
    ),
    arxiv="2505.06708",
    family=Family.REWEIGHT,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="a sigmoid gate on the attention output, per head or per element",
)
