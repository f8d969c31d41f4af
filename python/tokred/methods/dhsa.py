"""DHSA: score chunks of keys for every block of queries, then keep a budget of tokens.

Dynamic Hierarchical Sparse Attention for on-device language models (arXiv 2510.24606). The
published chunk boundaries come from a learned predictor; here they are an input, and chunks of a
fixed size are the training-free variant. Tokens of a chunk tie by construction: where the budget
cuts a chunk the lowest positions survive.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask


def chunk_scores(
    q: Tensor, k: Tensor, block_q: int, boundaries: Tensor, sqrt_len: bool = True
) -> Tensor:
    """Scores of (block of queries, chunk of keys), over the means of all heads.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D], rotated.
        boundaries: i32 [B | 1, C + 1], chunk c is the keys boundaries[c] .. boundaries[c + 1] - 1.
        sqrt_len: multiply each mean with the square root of its number of tokens.

    Returns:
        f32 [B, ceil(L / block_q), C]: q mean . k mean, unscaled.
    """
    statistic = "sqrt_mean" if sqrt_len else "mean"
    queries, _ = tokred.block_pool(q.float().mean(1, keepdim=True), block_q, statistic)
    keys, counts = tokred.block_pool(
        k.float().mean(1, keepdim=True), statistic=statistic, boundaries=boundaries
    )
    return tokred.block_score(queries[:, :, :, 0], keys, counts, scale=1.0)[:, 0]


def dhsa_indices(
    q: Tensor,
    k: Tensor,
    block_q: int = 128,
    budget: int = 2048,
    boundaries: Tensor | None = None,
    chunk_size: int = 32,
    num_sinks: int = 0,
    num_locals: int = 64,
    window: int | None = None,
    sqrt_len: bool = True,
) -> Tensor:
    """The keys of each block of queries, one list for all heads.

    A block sees the tokens up to its own last one (within `window` of it); the last num_locals of
    them and the first num_sinks are always kept.

    Args:
        q, k, boundaries, sqrt_len: as in chunk_scores; chunks of chunk_size where boundaries are
            None. q and k have the same tokens.
        budget: tokens kept, sinks and locals included.

    Returns:
        i32 [B, ceil(N / block_q), min(budget, N)] by position, -1 padded.
    """
    tokens, device = k.shape[2], k.device
    if boundaries is None:
        edges = torch.arange(0, tokens + chunk_size, chunk_size, device=device)
        boundaries = edges.clamp(max=tokens).to(torch.int32)[None]
    scores = chunk_scores(q, k, block_q, boundaries, sqrt_len)
    positions = torch.arange(tokens, device=device)
    chunk = torch.searchsorted(
        boundaries.long(), positions.expand(boundaries.shape[0], -1).contiguous(), right=True
    )
    chunk = (chunk - 1).clamp(0, scores.shape[-1] - 1)
    chunk = chunk.expand(scores.shape[0], -1)[:, None].expand(-1, scores.shape[1], -1)
    token_scores = scores.gather(-1, chunk)
    ends = (torch.arange(1, scores.shape[1] + 1, device=device) * block_q).clamp(max=tokens)
    if window is not None:
        hidden = positions < ends[:, None] - window
        token_scores = token_scores.masked_fill(hidden, -torch.inf)
    return tokred.topk(
        token_scores,
        min(budget, tokens),
        ends.to(torch.int32)[None],
        order="position",
        num_sinks=num_sinks,
        num_locals=num_locals,
    )[1]


def dhsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int = 128,
    instruction_tokens: int = 64,
    scale: float | None = None,
    **choice: object,
) -> Tensor:
    """Causal prefill over dhsa_indices(q, k, block_q, **choice).

    The last instruction_tokens queries attend to everything.

    Returns:
        [B, Hq, N, Dv].
    """
    lists = dhsa_indices(q, k, block_q, **choice)[:, None]
    out, _ = tokred.sparse_attention(q, k, v, lists, scale=scale, causal=True, block_q=block_q)
    dense = min(instruction_tokens, q.shape[2])
    if dense > 0:
        last, _ = tokred.biased_attention(q[:, :, -dense:], k, v, causal=True, scale=scale)
        out[:, :, -dense:] = last
    return out


def dhsa_block_mask(
    q: Tensor,
    k: Tensor,
    block_q: int = 128,
    block_k: int = 32,
    density: float = 0.125,
    causal: bool = True,
    force_ends: bool = True,
) -> Tensor:
    """The second version: whole rectangles of block_q x block_k, by the product of mean vectors.

    Args:
        density: the share of key blocks that each row of blocks keeps.
        causal: choose among the key blocks that start before the end of the query block. The
            published default chooses among all, future ones included.
        force_ends: always keep the first and the newest visible key block.

    Returns:
        bool [B, Hq, ceil(L / block_q), ceil(N / block_k)] for tokred.block_sparse_attention.
    """
    queries, _ = tokred.block_pool(q, block_q)
    keys, counts = tokred.block_pool(k, block_k)
    scores = tokred.block_score(queries[:, :, :, 0], keys, counts, scale=1.0)
    blocks = scores.shape[-1]
    lengths = None
    if causal:
        rows = torch.arange(1, scores.shape[2] + 1, device=q.device)
        offset = k.shape[2] - q.shape[2]
        ends = (rows * block_q + offset).clamp(max=k.shape[2])
        lengths = (-(-ends // block_k)).to(torch.int32)[None, None]
    kept = max(int(density * blocks), 1)
    ends = {"num_sinks": 1, "num_locals": 1} if force_ends else {}
    return block_mask(tokred.topk(scores, kept, lengths, **ends)[1], blocks)
