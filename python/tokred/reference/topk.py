"""Choosing entries of a row, in plain torch. Integers decide, so every backend agrees exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "compact",
    "eviction_slot",
    "gather_tokens",
    "inverse_transform_sample",
    "replace_token",
    "topk",
    "topk_with_counts",
]

_PROBABILITY_BITS = 40
_MAX_INT = 2**31 - 1
_LIMB_BITS = 30


def _clean(scores: Tensor) -> Tensor:
    """The scores as they are ranked: float32, NaN as -inf, -0 as +0."""
    scores = scores.float()
    return scores.masked_fill(scores.isnan(), -torch.inf) + 0.0


def _row_lengths(lengths: Tensor | None, rows: torch.Size, columns: int, like: Tensor) -> Tensor:
    """i64 [.., 1] in [0, columns]."""
    if lengths is None:
        return torch.full((*rows, 1), columns, device=like.device)
    return lengths.long().clamp(0, columns).expand(rows).unsqueeze(-1)


def _prefixes_within(values: Tensor, top_p: float) -> Tensor:
    """How many prefixes of the last dimension have a sum of probabilities <= top_p.

    Sums are of integers in two limbs: a sum of many large ones would not fit into 64 bits.
    """
    limit = int(min(max(top_p, -1.0), 2.0**20) * 2**_PROBABILITY_BITS // 1)
    whole = (values.double().clamp(0, 2**20) * 2**_PROBABILITY_BITS).long()
    low = (whole & (2**_LIMB_BITS - 1)).cumsum(-1)
    high = (whole >> _LIMB_BITS).cumsum(-1) + (low >> _LIMB_BITS)
    low = low & (2**_LIMB_BITS - 1)
    limit_high, limit_low = limit >> _LIMB_BITS, limit & (2**_LIMB_BITS - 1)
    within = (high < limit_high) | ((high == limit_high) & (low <= limit_low))
    return within.sum(-1, keepdim=True)


def topk_with_counts(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    order: str = "score",
    row_k: Tensor | None = None,
    num_sinks: int = 0,
    num_locals: int = 0,
    must_keep: Tensor | None = None,
    top_p: float | None = None,
    min_k: int = 1,
    threshold: float | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See tokred.topk_with_counts."""
    *rows, columns = scores.shape
    score = _clean(scores)
    length = _row_lengths(lengths, scores.shape[:-1], columns, score)
    position = torch.arange(columns, device=score.device).expand(score.shape)
    inside = position < length
    forced = (position < num_sinks) | (position >= length - num_locals)
    if must_keep is not None:
        forced = forced | must_keep
    candidate = score > -torch.inf
    if threshold is not None:
        candidate &= score > torch.tensor(threshold, dtype=torch.float32)
    # 0 forced, 1 candidate, 2 neither.
    rank = torch.where(forced, 0, torch.where(candidate, 1, 2)).masked_fill(~inside, 2)

    if block_size:
        segments = max(1, -(-columns // block_size))
        missing = segments * block_size - columns
        score, rank, position = (
            pad(t, (0, missing), value=fill).unflatten(-1, (segments, block_size))
            for t, fill in ((score, -torch.inf), (rank, 2), (position, -1))
        )

    by_score = score.argsort(dim=-1, descending=True, stable=True)
    by_rank = rank.gather(-1, by_score).argsort(dim=-1, stable=True)
    chosen = by_score.gather(-1, by_rank)
    missing = max(0, k - chosen.shape[-1])
    values = pad(score.gather(-1, chosen), (0, missing), value=-torch.inf)[..., :k]
    indices = pad(position.gather(-1, chosen), (0, missing), value=-1)[..., :k]

    limit = torch.full((*rows, 1), k, device=score.device)
    if row_k is not None:
        limit = row_k.long().clamp(0, k).expand(rows).unsqueeze(-1)
    counts = (rank < 2).sum(-1, keepdim=True)
    counts = torch.minimum(counts, limit.unsqueeze(-2) if block_size else limit)
    slot = torch.arange(k, device=score.device)
    if top_p is not None:
        empty = slot >= counts
        within = _prefixes_within(values.masked_fill(empty, torch.inf), top_p)
        counts = torch.minimum(counts, (within + 1).clamp(min=min_k))

    empty = slot >= counts
    values = values.masked_fill(empty, -torch.inf)
    indices = indices.masked_fill(empty, -1)
    if order == "position":
        by_position = indices.masked_fill(empty, columns).argsort(dim=-1, stable=True)
        values, indices = values.gather(-1, by_position), indices.gather(-1, by_position)
    elif order != "score":
        raise ValueError(f"order {order!r} is neither 'score' nor 'position'")
    return values, indices.int(), counts.squeeze(-1).int()


def topk(
    scores: Tensor,
    k: int,
    lengths: Tensor | None = None,
    order: str = "score",
    row_k: Tensor | None = None,
    num_sinks: int = 0,
    num_locals: int = 0,
    must_keep: Tensor | None = None,
    top_p: float | None = None,
    min_k: int = 1,
    threshold: float | None = None,
    block_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """See tokred.topk."""
    values, indices, _ = topk_with_counts(
        scores, k, lengths, order, row_k, num_sinks, num_locals, must_keep, top_p, min_k,
        threshold, block_size,
    )  # fmt: skip
    return values, indices


def compact(
    selected: Tensor,
    threshold: float | None = None,
    capacity: int | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.compact."""
    columns = selected.shape[-1]
    capacity = columns if capacity is None else capacity
    entries = selected if selected.dtype == torch.int32 else None
    if entries is not None:
        selected = entries >= 0
    if selected.dtype != torch.bool:
        if threshold is None:
            raise ValueError("a threshold is needed where `selected` holds scores")
        selected = selected.float() > torch.tensor(threshold, dtype=torch.float32)
    position = torch.arange(columns, device=selected.device)
    inside = position < _row_lengths(lengths, selected.shape[:-1], columns, selected)
    ranked = torch.where(selected & inside, position, columns).sort(dim=-1).values
    ranked = pad(ranked, (0, max(0, capacity - columns)), value=columns)[..., :capacity]
    empty = ranked == columns
    if entries is not None:
        ranked = pad(entries, (0, 1)).gather(-1, ranked)
    return ranked.masked_fill(empty, -1).int(), (~empty).sum(-1).int()


def gather_tokens(
    tensors: Sequence[Tensor], indices: Tensor, token_dims: Sequence[int] | None = None
) -> list[Tensor]:
    """See tokred.gather_tokens."""
    if token_dims is None:
        token_dims = [1 if t.dim() <= 3 else 2 for t in tensors]
    results = []
    for tensor, dim in zip(tensors, token_dims, strict=True):
        index = indices.long()
        if dim == 2 and index.dim() == 2:
            index = index.unsqueeze(1)
        index = index.expand(*tensor.shape[:dim], index.shape[-1])
        inside = (index >= 0) & (index < tensor.shape[dim])
        shape = (*index.shape, *[1] * (tensor.dim() - dim - 1))
        full = (*index.shape, *tensor.shape[dim + 1 :])
        # Indices outside point at a row of zeros behind the tokens.
        zero = tensor.new_zeros(*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])
        padded = torch.cat([tensor, zero], dim)
        index = torch.where(inside, index, tensor.shape[dim])
        results.append(padded.gather(dim, index.reshape(shape).expand(full)))
    return results


def eviction_slot(
    position: Tensor,
    length: int,
    scores: Tensor | None = None,
    logits: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    start: Tensor | None = None,
    newest: Tensor | None = None,
    first: int = 0,
    recent: int = 0,
    shared: bool = False,
    largest: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.eviction_slot; in the precision of logits, or of scores."""
    batch, heads, keys = position.shape
    ranked = eviction_scores(position, scores, logits, lse, bias, newest, shared, softcap)
    rank = (-ranked if largest else ranked) + 0.0
    rank = rank.masked_fill(rank.isnan(), -torch.inf)
    begin = position.new_zeros(batch, 1, 1) if start is None else start[:, None, None]
    end = begin.long() + min(first, 2**32)
    recent_after = min(max(length - 1 - recent, -_MAX_INT - 1), _MAX_INT)
    stays = ((position >= begin) & (position < end)) | (position > recent_after)
    rank = rank.masked_fill(stays, torch.inf)
    if bias is not None:
        rank = rank.masked_fill(~(bias > -torch.inf), -torch.inf)
    slot = position.new_full((batch, heads, 1), -1)
    if keys > 0:
        slots = torch.arange(keys, device=position.device)
        smallest = rank == rank.amin(2, keepdim=True)
        slot = slots.where(smallest, keys).amin(2, keepdim=True).int()
    if logits is None:
        return slot, position.new_empty((batch, heads, 0), dtype=torch.float32)
    return slot, ranked.scatter(2, slot[..., : keys > 0].long(), 0)


def eviction_scores(
    position: Tensor,
    scores: Tensor | None,
    logits: Tensor | None,
    lse: Tensor | None,
    bias: Tensor | None,
    newest: Tensor | None,
    shared: bool,
    softcap: float | None,
) -> Tensor:
    """[B, H, N]: the scores by which eviction_slot ranks the keys."""
    if logits is None or lse is None:
        ends = -_MAX_INT, _MAX_INT - 1
        return position.clamp(*ends).double() if scores is None else scores
    hidden = torch.zeros(position.shape, dtype=torch.bool, device=position.device)
    if bias is not None:
        bias = bias.expand(position.shape)
        hidden = ~(bias > -torch.inf)
    own = _own_weights(logits, lse, bias, hidden, newest, position.shape[1], softcap)
    received = own.mean(2)
    if shared:
        received = own.flatten(1, 2).mean(1, keepdim=True).expand(position.shape)
    return received.contiguous() if scores is None else scores + received


def _own_weights(
    logits: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    newest: Tensor | None,
    heads: int,
    softcap: float | None,
) -> Tensor:
    """The weights [B, H, G, N] that the heads of a query give to the keys of each head."""
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    batch, heads_q, keys = logits.shape
    lse = lse.reshape(batch, heads_q)
    x = (logits - lse[..., None]).reshape(batch, heads, heads_q // max(heads, 1), keys)
    if bias is not None:
        x = x + bias[:, :, None]
    weight = x.clamp(max=88.0).exp()
    nothing = (lse == -torch.inf).reshape(x.shape[:3])[..., None] | hidden[:, :, None]
    if keys:
        own = hidden.new_full((batch, heads, 1), keys - 1, dtype=torch.long)
        if newest is not None:
            own = newest.long()
        inside = (own >= 0) & (own < keys)
        nothing = nothing | (hidden.gather(2, own.where(inside, 0)) & inside)[..., None]
    return weight.masked_fill(nothing, 0)


def replace_token(
    slot: Tensor,
    keys: Tensor,
    new_keys: Tensor,
    values: Tensor,
    new_values: Tensor,
    position: Tensor | None = None,
    new_position: int = 0,
) -> None:
    """See tokred.replace_token."""
    here = slot[..., 0].long()
    batch, head = ((here >= 0) & (here < keys.shape[2])).nonzero(as_tuple=True)
    index = batch, head, here[batch, head]
    keys[index] = new_keys[batch, head, 0]
    values[index] = new_values[batch, head, 0]
    if position is not None:
        position[index] = new_position


def inverse_transform_sample(
    scores: Tensor, num_samples: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See tokred.inverse_transform_sample."""
    *rows, columns = scores.shape
    lines = math.prod(rows)
    score = _clean(scores).clamp(0, torch.finfo(torch.float32).max).reshape(lines, columns)
    keep = torch.ones_like(score, dtype=torch.bool)
    if mask is not None:
        keep = mask.expand(scores.shape).reshape(lines, columns)
    indices = torch.full((lines, num_samples), -1, device=scores.device)
    counts = torch.zeros(lines, dtype=torch.int32, device=scores.device)
    for row in range(lines):
        position = keep[row].nonzero().squeeze(-1)
        if not num_samples or not len(position):
            continue
        ascending, by_score = score[row, position].sort(stable=True)
        picks = _sample(ascending.double(), num_samples)
        indices[row, : len(picks)] = position[by_score[picks]]
        counts[row] = len(picks)
    return indices.int().reshape(*rows, num_samples), counts.reshape(rows)


def _sample(ascending: Tensor, num_samples: int) -> Tensor:
    """The distinct picks, ascending, among the sorted scores of one row."""
    largest = ascending[-1]
    share = ascending / torch.where(largest > 0, largest, 1.0)
    total = (share * 2**_PROBABILITY_BITS).long().cumsum(0)
    span = (total[-1] - total[0]).double()
    curve = (total - total[0]).double() / torch.where(span > 0, span, 1.0)
    positive = curve[curve > 0]
    if len(positive):
        start = positive[0]
        step = torch.arange(num_samples, dtype=torch.float64, device=curve.device)
        where = start + step * (1 - start) / max(1, num_samples - 1)
    else:
        where = curve.new_zeros(1)
    distance = (where[:, None] - curve[None, :]).abs()
    nearest = distance == distance.min(dim=1, keepdim=True).values
    entry = torch.arange(len(curve), device=curve.device)
    return torch.where(nearest, entry, len(curve)).min(dim=1).values.unique()
