"""XTR: documents are scored by the tokens that were retrieved, what was not gets an upper bound.

Rethinking the Role of Token Retrieval in Multi-Vector Retrieval (arXiv 2304.01982).

Every token of the query retrieves its k nearest tokens of all documents. A document's score is the
mean over the query's tokens of its best retrieved similarity; where it has none, it gets the last
one retrieved, which bounds it from above. Documents without any are not scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


def retrieve(
    query: Tensor, tokens: Tensor, k: int = 100, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best tokens of all documents for every token of the query, by inner product.

    Args:
        query: [B, Q, C]. tokens: [T, C], those of all documents in a row.
        token_mask: bool [T], False is never retrieved.

    Returns:
        (score f32 [B, Q, k], index i32 [B, Q, k]), best first; (-inf, -1) where there are fewer.

    Complexity: 2 B Q T C flops; no Q x T matrix is stored.
    """
    check_minimum(1, k=k)
    batch = query.shape[0]
    rows = query.detach().flatten(0, 1)[None].contiguous()
    mask = None if token_mask is None else token_mask[None].contiguous()
    keys = tokens.detach()[None].contiguous()
    score, index = tokred.match(rows, keys, mask_b=mask, metric="dot", k=k)
    shape = (batch, query.shape[1], k)
    return score.reshape(shape), index.reshape(shape)


def late_interaction(
    score: Tensor,
    index: Tensor,
    document: Tensor,
    num_documents: int,
    query_mask: Tensor | None = None,
) -> Tensor:
    """The scores of all documents, from the tokens that were retrieved.

    Args:
        score: f32 [B, Q, k], index: i32 [B, Q, k], of retrieve. NaN and -1 are left out.
        document: i32 [T], the document of every token, from 0 to num_documents - 1.
        query_mask: bool [B, Q], False takes a token of the query out.

    Returns:
        f32 [B, num_documents], -inf for documents of which nothing was retrieved.

    O(B Q k log k) time, O(B (Q k + num_documents)) memory; sums in the order of the query.
    """
    batch, queries, k = score.shape
    there = (index >= 0) & ~score.isnan() & (score > -torch.inf)
    if query_mask is not None:
        there = there & query_mask[..., None]
    last = torch.where(there, score, torch.inf).amin(-1)
    last = torch.where(there.any(-1), last, 0.0)
    owner = document.long()[index.clamp(min=0).long()]
    # The first of each document in a row is its best: rows are by descending score.
    by_owner = torch.where(there, owner, num_documents)
    ranked = torch.where(there, score, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    by_owner = by_owner.gather(-1, ranked)
    gains = torch.where(there, score - last[..., None], 0.0).gather(-1, ranked)
    grouped, order = by_owner.sort(dim=-1, stable=True)
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[..., 1:] = grouped[..., 1:] != grouped[..., :-1]
    first = first & (grouped < num_documents)
    ids = torch.where(first, grouped, -1).to(torch.int32).reshape(batch, queries * k)
    values = gains.gather(-1, order).reshape(batch, queries * k, 1)
    both = torch.cat([values, torch.ones_like(values)], -1).contiguous()
    sums = tokred.segment_pool(both, ids=ids, num_segments=num_documents, mode="sum")
    counted = queries if query_mask is None else query_mask.sum(1)[:, None].clamp(min=1)
    total = (last.sum(1, keepdim=True) + sums[..., 0]) / counted
    return torch.where(sums[..., 1] > 0, total, -torch.inf)


METHOD = Method(
    title="Rethinking the Role of Token Retrieval in Multi-Vector Retrieval",
    arxiv="2304.01982",
    family=Family.REUSE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="score documents by their retrieved tokens, and bound what was not retrieved",
)
