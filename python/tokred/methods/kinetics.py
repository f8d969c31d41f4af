"""Kinetics: sparse decoding by the mean logit of a group, token by token or block by block.

Kinetics: Rethinking Test-Time Scaling Laws (arXiv 2506.05333). Every function returns the keys a
group of query heads attends to, i32 [B, Hkv, width] with -1 padding, for kinetics_attention; rows
with fewer keys than the budget get them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask, expand_blocks

from ._lists import key_lengths, range_list


def token_topk(
    q: Tensor,
    k: Tensor,
    topk: int,
    sink: int = 4,
    local: int = 64,
    lengths: Tensor | None = None,
) -> Tensor:
    """The topk tokens of greatest mean logit, besides the first `sink` and the last `local`.

    Args:
        q: [B, Hq, 1, D]; k: [B, Hkv, N, D].
        lengths: i32 [B], the keys of each row; all N where None.
    """
    scores = tokred.qk_score(q, k, reduce="group_mean", lengths=lengths)
    per_row = key_lengths(k, lengths)[:, None]
    width = min(sink + topk + local, k.shape[2])
    options = {"order": "position", "num_sinks": sink, "num_locals": local}
    return tokred.topk(scores, width, per_row, **options)[1]


def _dynamic_tokens(
    lengths: Tensor, block_size: int, num_blocks: int, sink: int, local: int
) -> Tensor:
    """i32 [B]: the tokens that blocks are chosen from; 0 where the row has no need to choose."""
    budget = sink + local + num_blocks * block_size
    active = lengths > -(-budget // block_size) * block_size
    dynamic = (lengths - local - sink).clamp(min=0) // block_size * block_size
    return torch.where(active, dynamic, 0)


def _block_scores(q: Tensor, k: Tensor, sink: int, block_size: int) -> Tensor:
    """f32 [B, Hkv, M]: mean logit of the group in each whole block behind the sinks."""
    blocks = max(k.shape[2] - sink, 0) // block_size
    pooled, _ = tokred.block_pool(k[:, :, sink : sink + blocks * block_size], block_size)
    return tokred.block_score(q, pooled, reduce="group_mean")[:, :, 0]


def _key_list(
    middle: Tensor, k: Tensor, block_size: int, sink: int, local: int, num_blocks: int,
    dynamic: Tensor, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """`middle` i32 [B, Hkv, M] between the sinks and the tokens behind the dynamic part; in rows
    where nothing is dynamic, all tokens. Padded with -1."""
    shape = (*middle.shape[:2], -1)
    none = torch.zeros_like(lengths)
    first = range_list(none, lengths.clamp(max=sink), sink)
    last = range_list((sink + dynamic).clamp(max=lengths), lengths, local + block_size - 1)
    chosen = torch.cat([first[:, None].expand(shape), middle, last[:, None].expand(shape)], dim=-1)
    width = min(sink + local + (num_blocks + 1) * block_size, k.shape[2])
    everything = range_list(none, lengths, width)[:, None].expand(shape)
    width = max(chosen.shape[-1], width)
    padded = (
        torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-1) for t in (chosen, everything)
    )
    return torch.where((dynamic > 0)[:, None, None], *padded)


def block_topk(
    q: Tensor,
    k: Tensor,
    topk_blocks: int,
    block_size: int = 16,
    sink: int = 4,
    local: int = 64,
    lengths: Tensor | None = None,
) -> Tensor:
    """The topk_blocks blocks of greatest mean logit, besides sinks and local tokens.

    Blocks start behind the sinks; what does not fill a block is local. The mean of the logits is
    the logit of the mean key, so a cache of mean keys gives the same. Arguments as in token_topk.
    """
    lengths = key_lengths(k, lengths)
    dynamic = _dynamic_tokens(lengths, block_size, topk_blocks, sink, local)
    scores = _block_scores(q, k, sink, block_size)
    count = min(topk_blocks, scores.shape[-1])
    per_row = (dynamic // block_size).to(torch.int32)[:, None]
    blocks = tokred.topk(scores, count, per_row, order="position")[1]
    middle = expand_blocks(blocks, block_size, k.shape[2], sink)
    return _key_list(middle, k, block_size, sink, local, topk_blocks, dynamic, lengths)


def strided_topk(
    q: Tensor,
    k: Tensor,
    topk_blocks: int,
    block_size: int = 16,
    sink: int = 4,
    local: int = 64,
    lengths: Tensor | None = None,
) -> Tensor:
    """As block_topk over blocks that start every half block.

    Twice as many blocks are chosen; of the tokens they cover the first topk_blocks * block_size by
    position are kept, as published (so an overfull choice loses its newest tokens).

    Raises:
        ValueError: block_size is odd.
    """
    if block_size % 2:
        raise ValueError(f"block_size must be even, got {block_size}")
    half = block_size // 2
    lengths = key_lengths(k, lengths)
    dynamic = _dynamic_tokens(lengths, block_size, topk_blocks, sink, local)
    halves = _block_scores(q, k, sink, half)
    scores = (halves[..., :-1] + halves[..., 1:]) / 2
    count = min(2 * topk_blocks, scores.shape[-1])
    per_row = (dynamic // half - 1).clamp(min=0).to(torch.int32)[:, None]
    chosen = tokred.topk(scores, count, per_row)[1]
    starts = block_mask(chosen, scores.shape[-1])
    covered = torch.zeros(*halves.shape, dtype=torch.bool, device=k.device)
    covered[..., :-1] |= starts
    covered[..., 1:] |= starts
    kept = tokred.compact(covered, capacity=2 * topk_blocks)[0]
    middle = expand_blocks(kept, half, k.shape[2], sink)
    return _key_list(middle, k, block_size, sink, local, topk_blocks, dynamic, lengths)


def kinetics_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every group to its list i32 [B, Hkv, K]: out [B, Hq, 1, Dv], lse f32."""
    return tokred.sparse_attention(q, k, v, indices[:, :, None], scale=scale)
