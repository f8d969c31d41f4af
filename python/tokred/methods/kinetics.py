"""Kinetics: sparse decoding by the mean logit of a group, token by token or block by block.

Kinetics: Rethinking Test-Time Scaling Laws (arXiv 2506.05333). Every function returns the keys a
group of query heads attends to, i32 [B, Hkv, width] with -1 padding, for kinetics_attention; rows
with fewer keys than the budget get them all. The release leaves the first layer dense, which is up
to the caller; its variants that draw tokens at random are not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask, expand_blocks

from ._lists import check_minimum, key_lengths, range_list
from ._method import Family, Method, Needs


def _token_scores(q: Tensor, k: Tensor, lengths: Tensor | None) -> Tensor:
    """f32 [B, Hkv, N]: the mean logit of the group on each key."""
    return tokred.qk_score(q.detach(), k.detach(), reduce="group_mean", lengths=lengths)


def token_topk(
    q: Tensor,
    k: Tensor,
    topk: int,
    sink: int = 4,
    local: int = 64,
    lengths: Tensor | None = None,
) -> Tensor:
    """The topk tokens of largest mean logit, besides the first `sink` and the last `local`.

    Args:
        q: [B, Hq, 1, D]; k: [B, Hkv, N, D].
        topk, sink, local: at least 0.
        lengths: i32 [B], the keys of each row, padded behind them; all N where None. A row without
            keys lists none.

    Raises:
        ValueError: a negative number.
    """
    check_minimum(0, topk=topk, sink=sink, local=local)
    scores = _token_scores(q, k, lengths)
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
    keys = k.detach()[:, :, sink : sink + blocks * block_size]
    pooled, _ = tokred.block_pool(keys, block_size)
    return tokred.block_score(q.detach(), pooled, reduce="group_mean")[:, :, 0]


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
    chosen, everything = (
        torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-1) for t in (chosen, everything)
    )
    return torch.where((dynamic > 0)[:, None, None], chosen, everything)


def block_topk(
    q: Tensor,
    k: Tensor,
    topk_blocks: int,
    block_size: int = 16,
    sink: int = 4,
    local: int = 64,
    lengths: Tensor | None = None,
) -> Tensor:
    """The topk_blocks blocks of largest mean logit, besides sinks and local tokens.

    Blocks start behind the sinks; what does not fill a block is local. The mean of the logits is
    the logit of the mean key, so a cache of mean keys gives the same. Arguments and errors as in
    token_topk, and block_size at least 1.
    """
    check_minimum(0, topk_blocks=topk_blocks, sink=sink, local=local)
    check_minimum(1, block_size=block_size)
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
    stride: int = 8,
) -> Tensor:
    """As block_topk over overlapping blocks, one every `stride` tokens behind the sinks.

    The blocks run up to the local tokens; what does not fill the last one is never chosen. Twice
    as many blocks as topk_blocks are chosen, and of the tokens that they cover the first
    topk_blocks * block_size by position are kept, as published (so an overfull choice loses its
    newest tokens). Every row that has a whole block between sinks and locals chooses, even where
    its tokens would fit into the budget. Arguments and errors as in block_topk, and stride at
    least 1.
    """
    check_minimum(0, topk_blocks=topk_blocks, sink=sink, local=local)
    check_minimum(1, block_size=block_size, stride=stride)
    lengths, tokens = key_lengths(k, lengths), k.shape[2]
    dynamic = (lengths - sink - local).clamp(min=0)
    dynamic = torch.where(dynamic < block_size, 0, dynamic)
    blocks = max(tokens - sink - block_size, -stride) // stride + 1
    if blocks == 0:
        return range_list(lengths * 0, lengths, tokens)[:, None].expand(-1, k.shape[1], -1)
    logits = _token_scores(q, k, lengths)[..., sink:]
    scores = torch.nn.functional.avg_pool1d(logits, block_size, stride)
    per_row = torch.where(dynamic > 0, (dynamic - block_size) // stride + 1, 0)
    count = min(2 * topk_blocks, blocks)
    chosen = block_mask(
        tokred.topk(scores, count, per_row[:, None].to(torch.int32))[1], blocks
    ).int()
    # +1 where a chosen block starts, -1 where it ends: its tokens have a positive running sum.
    edges = torch.zeros(*chosen.shape[:2], tokens - sink + 1, dtype=torch.int32, device=k.device)
    last = (blocks - 1) * stride + 1
    edges[..., :last:stride] += chosen
    edges[..., block_size : block_size + last : stride] -= chosen
    covered = edges.cumsum(2)[..., :-1] > 0
    kept = tokred.compact(covered, capacity=topk_blocks * block_size)[0]
    middle = torch.where(kept >= 0, kept + sink, -1)
    shape = (*middle.shape[:2], -1)
    none = torch.zeros_like(lengths)
    first = range_list(none, lengths.clamp(max=sink), sink)
    newest = range_list(lengths - local, lengths, local)
    parts = [first[:, None].expand(shape), middle, newest[:, None].expand(shape)]
    selected = torch.cat(parts, -1)
    # A row without a whole block keeps everything.
    width = max(min(sink + local + block_size - 1, tokens), selected.shape[-1])
    everything = range_list(none, lengths, width)[:, None].expand(shape)
    selected = torch.nn.functional.pad(selected, (0, width - selected.shape[-1]), value=-1)
    return torch.where((dynamic > 0)[:, None, None], selected, everything)


def kinetics_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every group to its list i32 [B, Hkv, K]: out [B, Hq, 1, Dv], lse f32."""
    return tokred.sparse_attention(q, k, v, indices[:, :, None], scale=scale)


METHOD = Method(
    title="Kinetics: Rethinking Test-Time Scaling Laws",
    arxiv="2506.05333",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="keep the tokens or blocks of largest mean logit in a group of query heads",
)
