"""ActQKV, approximate: a probe query that stresses unusual queries retrieves blocks of keys.

Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference (arXiv
2502.13542). Known are the parts: a mean of the window's queries weighted by how far each lies from
the window's mean, block retrieval by similarity, and a per-layer cut-off from information density.
Not known are the formulas: here the weights are the softmax of the distances, and the cut-off is
the perplexity exp(entropy) of the block probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.selection import expand_blocks


def probe_query(q: Tensor) -> Tensor:
    """[B, Hq, 1, D]: the weighted mean of a window of queries [B, Hq, L, D]."""
    distance = (q.float() - q.float().mean(2, keepdim=True)).norm(dim=-1, keepdim=True)
    return (distance.softmax(2) * q.float()).sum(2, keepdim=True).to(q.dtype)


def retrieve(
    q: Tensor,
    k: Tensor,
    budget: int = 2048,
    block: int = 64,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The tokens of the blocks most similar to the probe query.

    Args:
        q: [B, Hq, L, D], the window's queries; k: [B, Hkv, N, D].
        budget: tokens at most; a row whose block probabilities are concentrated takes fewer blocks.

    Returns:
        i32 [B, Hkv, budget // block * block] by position, -1 padded.
    """
    pooled, counts = tokred.block_pool(k, block, mask=mask)
    scores = tokred.block_score(probe_query(q), pooled, counts, reduce="group_mean", scale=scale)[
        :, :, 0
    ]
    log_probability = scores.log_softmax(-1)
    terms = torch.where(scores == -torch.inf, 0.0, log_probability.exp() * log_probability)
    density = (-terms.sum(-1)).exp().ceil().to(torch.int32)
    count = min(max(budget // block, 1), scores.shape[-1])
    blocks = tokred.topk(scores, count, row_k=density, order="position")[1]
    return expand_blocks(blocks, block, k.shape[2])


def act_qkv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: int = 2048,
    block: int = 64,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a window of queries to retrieve(q, k, ..): out [B, Hq, L, Dv], lse."""
    indices = retrieve(q, k, budget, block, mask, scale)[:, :, None]
    return tokred.sparse_attention(q, k, v, indices, scale=scale, mask=mask, block_q=q.shape[2])
