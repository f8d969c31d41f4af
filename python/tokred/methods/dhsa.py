"""DHSA: score chunks of keys for every block of queries, then keep a budget of tokens.

Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (arXiv
2510.24606).

The published chunk boundaries come from a learned predictor; here they are an input, and chunks of
a fixed size are the training-free variant. Tokens of a chunk tie by construction: where the budget
cuts a chunk the lowest positions survive, which the release leaves to torch.topk. Different from
the release: no key is listed twice. There, a list with too few keys is filled up with the last
token, and the first tokens of a block shorter than num_sinks repeat its last one; both count once
more in the softmax. As there, rows have no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask

from ._lists import check_minimum
from ._method import Family, Method, Needs


def chunk_scores(
    q: Tensor, k: Tensor, block_q: int, boundaries: Tensor, sqrt_len: bool = True
) -> Tensor:
    """Scores of (block of queries, chunk of keys), over the means of all heads.

    Args:
        q: [B, Hq, L, D]; k: [B, Hkv, N, D], rotated.
        block_q: queries a block; the last one is filled up with zeros, which count in its mean.
        boundaries: i32 [B | 1, C + 1], chunk c is the keys boundaries[c] .. boundaries[c + 1] - 1.
        sqrt_len: multiply each mean with the square root of its number of tokens.

    Returns:
        f32 [B, ceil(L / block_q), C]: q mean . k mean, unscaled.
    """
    statistic = "sqrt_mean" if sqrt_len else "mean"
    q, k = (x.detach().float().mean(1, keepdim=True) for x in (q, k))
    queries, _ = tokred.block_pool(q, block_q, statistic)
    keys, counts = tokred.block_pool(k, statistic=statistic, boundaries=boundaries)
    scores = tokred.block_score(queries[:, :, :, 0], keys, counts, scale=1.0)[:, 0]
    if rest := q.shape[2] % block_q:
        scores[:, -1] *= rest / block_q
    return scores


def _check_boundaries(boundaries: Tensor, batch: int, tokens: int) -> None:
    shape = [*boundaries.shape]
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] < 2:
        raise ValueError(f"boundaries must be [{batch} | 1, chunks + 1], got {shape}")
    if torch.compiler.is_compiling():  # their values are not known
        return
    ascending = bool((boundaries.diff(dim=1) >= 0).all())
    if not ascending or (boundaries[:, 0] != 0).any() or (boundaries[:, -1] != tokens).any():
        raise ValueError(f"boundaries must ascend from 0 to the {tokens} tokens of k in every row")


def dhsa_indices(
    q: Tensor,
    k: Tensor,
    block_q: int = 128,
    budget: int = 2048,
    boundaries: Tensor | None = None,
    chunk_size: int = 32,
    num_sinks: int = 128,
    num_locals: int = 128,
    window: int | None = None,
    sqrt_len: bool = True,
) -> Tensor:
    """The keys of each block of queries, one list for all heads.

    Block i chooses among the tokens before e = (i + 1) block_q and, with a window, not before e -
    window. It keeps the last min(num_locals, budget) of them and those of best score; of these the
    num_sinks first by position make room for the first num_sinks tokens it may see.

    Args:
        q: [B, Hq, L, D], queries of the first L of k's tokens. k, boundaries, sqrt_len: as in
            chunk_scores; chunks of chunk_size where boundaries are None.
        budget: tokens kept, at least 1, sinks and locals included; at most `window`. With a budget
            of num_sinks or less all are sinks.
        window: a query sees `window` tokens before itself; at least 1.

    Returns:
        i32 [B, ceil(L / block_q), min(budget, window, N)] by position, -1 where a block has fewer.
        The last block may list tokens behind its queries, as published; causality hides them.

    Raises:
        ValueError: a negative number, boundaries that do not ascend from 0 to N, or L above N.
    """
    check_minimum(1, block_q=block_q, budget=budget, chunk_size=chunk_size)
    check_minimum(0, num_sinks=num_sinks, num_locals=num_locals)
    queries, tokens, device = q.shape[2], k.shape[2], k.device
    if queries > tokens:
        raise ValueError(f"q must have at most the {tokens} tokens of k, got {queries}")
    if boundaries is None:
        edges = torch.arange(0, tokens + chunk_size, chunk_size, device=device)
        boundaries = edges.clamp(max=tokens).to(torch.int32)[None]
    else:
        _check_boundaries(boundaries, k.shape[0], tokens)
    if window is not None:
        check_minimum(1, window=window)
        budget = min(budget, window)
    budget = min(budget, tokens)
    scores = chunk_scores(q, k, block_q, boundaries, sqrt_len)
    positions = torch.arange(tokens, device=device)
    chunk = torch.searchsorted(
        boundaries.long(), positions.expand(boundaries.shape[0], -1).contiguous(), right=True
    )
    chunk = (chunk - 1).clamp(0, scores.shape[-1] - 1)
    chunk = chunk.expand(scores.shape[0], -1)[:, None].expand(-1, scores.shape[1], -1)
    token_scores = scores.gather(-1, chunk)
    starts = torch.arange(scores.shape[1], device=device)[:, None] * block_q
    ends = (starts + block_q).clamp(max=tokens)
    recent = positions >= ends - min(num_locals, budget)
    if window is not None:
        hidden = positions < starts + block_q - window
        token_scores = token_scores.masked_fill(hidden, -torch.inf)
        recent = recent & ~hidden
    chosen = tokred.topk(
        token_scores,
        budget,
        ends[None, :, 0].to(torch.int32),
        order="position",
        must_keep=recent[None],
    )[1]
    sinks = min(num_sinks, budget)
    first = starts - window if window is not None else torch.zeros_like(starts)
    first = first.clamp(min=0) + torch.arange(sinks, device=device)
    first = torch.where(first < ends, first, -1).to(torch.int32)
    return torch.cat([first.expand(chosen.shape[0], -1, -1), chosen[..., sinks:]], -1)


def dhsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int = 128,
    instruction_tokens: int = 64,
    scale: float | None = None,
    **choice: Any,
) -> Tensor:
    """Causal prefill over dhsa_indices(q without the instruction, k, block_q, **choice).

    Args:
        q: [B, Hq, N, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        instruction_tokens: the last queries, which attend to everything and are in no block.
        choice: as in dhsa_indices. A window hides what lies more than that before a query; it takes
            a mask of N x N bytes.

    Returns:
        [B, Hq, N, Dv], differentiable, the choice itself aside. A query before all keys that its
        block lists gets 0; with num_locals of block_q or more there is none.

    Raises:
        ValueError: q of another number of tokens than k, or as in dhsa_indices.
    """
    check_minimum(0, instruction_tokens=instruction_tokens)
    tokens = k.shape[2]
    if q.shape[2] != tokens:
        raise ValueError(f"q must have the {tokens} tokens of k, got {q.shape[2]}")
    window, mask = choice.get("window"), None
    if window is not None:
        positions = torch.arange(tokens, device=q.device)
        mask = (positions >= positions[:, None] - window)[None, None]
    sparse = max(tokens - instruction_tokens, 0)
    lists = dhsa_indices(q[:, :, :sparse], k, block_q, **choice)[:, None]
    seen = (x[:, :, :sparse] for x in (q, k, v))
    options = {"scale": scale, "causal": True}
    out, _ = tokred.sparse_attention(
        *seen,
        lists,
        block_q=block_q,
        mask=None if mask is None else mask[..., :sparse, :sparse],
        **options,
    )
    if sparse == tokens:
        return out
    mask = None if mask is None else mask[..., sparse:, :]
    dense, _ = tokred.biased_attention(q[:, :, sparse:], k, v, mask=mask, **options)
    return torch.cat([out, dense], 2)


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

    With causal and force_ends it is the A-shaped mask of the release. With neither it is its plain
    choice, in which a row may keep nothing but future blocks. The last block may be short; the
    release fills it up.

    Args:
        density: the share of key blocks that each row of blocks keeps, in (0, 1]: int(density *
            blocks), at least 1.
        causal: choose among the key blocks that start before the end of the query block.
        force_ends: always keep the first and the newest visible key block, whatever the density.

    Returns:
        bool [B, Hq, ceil(L / block_q), ceil(N / block_k)] for tokred.block_sparse_attention.

    Raises:
        ValueError: a block below 1, or a density outside (0, 1].
    """
    check_minimum(1, block_q=block_q, block_k=block_k)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    queries, _ = tokred.block_pool(q.detach(), block_q)
    keys, counts = tokred.block_pool(k.detach(), block_k)
    scores = tokred.block_score(queries[:, :, :, 0], keys, counts, scale=1.0)
    blocks = scores.shape[-1]
    lengths = None
    if causal:
        rows = torch.arange(1, scores.shape[2] + 1, device=q.device)
        offset = k.shape[2] - q.shape[2]
        ends = (rows * block_q + offset).clamp(min=0, max=k.shape[2])
        lengths = (-(-ends // block_k)).to(torch.int32)[None, None]
    kept = max(int(density * blocks), 2 if force_ends else 1)
    forced = int(force_ends)
    best = tokred.topk(scores, min(kept, blocks), lengths, num_sinks=forced, num_locals=forced)[1]
    return block_mask(best, blocks)


METHOD = Method(
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    arxiv="2510.24606",
    family=Family.PREFILL,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="score chunks of keys per block of queries, keep a budget of tokens",
)
