"""Cartridges: one trained KV prefix shared by every sequence of a batch.

Cartridges: Lightweight and General-Purpose Long Context Representations via Self-Study (arXiv
2506.06266). Training the prefix is not part of this recipe.
"""

from __future__ import annotations

from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def shared_prefix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the prefix and the own tokens of every sequence.

    The prefix is read once for the whole batch: its queries are those of all sequences, as if they
    were one.

    Args:
        q: [B, Hq, L, D].
        prefix_k: [Hkv, P, D]; prefix_v: [Hkv, P, Dv].
        k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv]. causal, mask [B, N]: among these.

    Returns:
        out [B, Hq, L, Dv], lse f32 [B, Hq, L].
    """
    batch, heads, queries, _ = q.shape
    together = q.transpose(0, 1).flatten(1, 2)[None]
    out, lse = tokred.biased_attention(together, prefix_k[None], prefix_v[None], scale=scale)
    out = out.reshape(heads, batch, queries, -1).transpose(0, 1)
    lse = lse.reshape(heads, batch, queries).transpose(0, 1).contiguous()
    own = tokred.biased_attention(q, k, v, causal=causal, scale=scale, mask=mask)
    return tokred.combine_states(out, lse, *own)


METHOD = Method(
    title="Cartridges: Lightweight and General-Purpose Long Context Representations via Self-Study",
    arxiv="2506.06266",
    family=Family.REUSE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="one trained KV prefix, read once for all sequences of a batch",
)
