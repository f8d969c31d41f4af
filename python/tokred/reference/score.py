"""Scores of keys, blocks and tokens, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .match import NORM_EPS, similarity

__all__ = [
    "attention_columns",
    "attention_rows",
    "block_pool",
    "block_score",
    "pagerank",
    "qk_score",
    "similarity_stats",
    "transition_stats",
]


def _wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(scale: float | None, head_dim: int) -> float:
    return max(head_dim, 1) ** -0.5 if scale is None else scale


def _per_query_head(x: Tensor, heads_q: int) -> Tensor:
    """[B, Hkv, ...] to [B, Hq, ...]: query head h reads head h / (Hq / Hkv)."""
    return x.repeat_interleave(heads_q // x.shape[1], dim=1)


def _reduce_heads(scores: Tensor, visible: Tensor, heads_kv: int, reduce: str) -> Tensor:
    """Hides and reduces scores [B, Hq, ..., N]; visible broadcasts to them."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if reduce == "none":
        return scores
    if reduce == "head_mean":
        return scores.mean(1, keepdim=True)
    if reduce == "softmax_vote":
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        votes = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return votes.sum(1, keepdim=True)
    groups = scores.unflatten(1, (heads_kv, -1))
    if reduce == "group_mean":
        return groups.mean(2)
    if reduce == "group_max":
        return groups.amax(2)
    raise ValueError(f"reduce {reduce!r} is not one of tokred.qk_score's")


def qk_score(
    q: Tensor,
    k: Tensor,
    reduce: str = "none",
    dims: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """See tokred.qk_score. The scores have the precision of the computation."""
    heads_kv, head_dim = k.shape[1], k.shape[3]
    query = _wide(q if q.dim() == 3 else _wide(q).mean(2))
    batch, heads_q, _ = query.shape
    visible = torch.ones(batch, k.shape[2], dtype=torch.bool, device=q.device)
    if slots is not None:
        visible = (slots >= 0) & (slots < k.shape[2])
        stored = torch.cat([k[0], k.new_zeros(heads_kv, 1, head_dim)], 1)
        k = stored[:, torch.where(visible, slots, k.shape[2]).long()].transpose(0, 1)
    if lengths is not None:
        position = torch.arange(k.shape[2], device=q.device)
        visible = visible & (position < lengths[:, None])
    if mask is not None:
        visible = visible & mask

    key = _per_query_head(_wide(k), heads_q)
    if dims is not None:
        inside = (dims >= 0) & (dims < head_dim)
        column = torch.where(inside, dims, 0).long()
        query = query.gather(2, column.expand(batch, -1, -1)).masked_fill(~inside, 0)
        index = column[None, :, None, :].expand(batch, -1, key.shape[2], -1)
        key = key.gather(3, index).masked_fill(~inside[None, :, None, :], 0)
    scores = _scale(scale, head_dim) * (query[:, :, None, :] @ key.transpose(2, 3))[:, :, 0]
    return _reduce_heads(scores, visible[:, None], heads_kv, reduce)


def block_pool(
    x: Tensor,
    block_size: int = 0,
    statistic: str = "mean",
    boundaries: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.block_pool. The statistics have the precision of the computation."""
    batch, _, tokens, _ = x.shape
    position = torch.arange(tokens, device=x.device)
    if boundaries is None:
        first = torch.arange(0, tokens, block_size, device=x.device)[None]
        last = first + block_size
    else:
        first, last = boundaries[:, :-1], boundaries[:, 1:]
    member = (position >= first[..., None]) & (position < last[..., None])
    member = member.expand(batch, -1, -1)
    if lengths is not None:
        member = member & (position < lengths[:, None, None])
    if mask is not None:
        member = member & mask[:, None, :]
    counts = member.sum(2)

    inside = member[:, None, :, :, None]
    values = _wide(x)[:, :, None]
    divisor = counts.clamp(min=1)[:, None, :, None]
    mean = values.masked_fill(~inside, 0).sum(3) / divisor
    if statistic == "mean":
        pooled = [mean]
    elif statistic == "sqrt_mean":
        pooled = [mean * divisor.to(mean.dtype).sqrt()]
    elif statistic == "min_max":
        padded = torch.nn.functional.pad(values, (0, 0, 0, 1))
        outside = torch.nn.functional.pad(~inside, (0, 0, 0, 1), value=True)
        pooled = [
            padded.masked_fill(outside, torch.inf).amin(3),
            padded.masked_fill(outside, -torch.inf).amax(3),
        ]
    elif statistic == "mean_deviation":
        distance = (values - mean[:, :, :, None]).abs()
        pooled = [mean, distance.masked_fill(~inside, 0).sum(3) / divisor]
    else:
        raise ValueError(f"statistic {statistic!r} is not one of tokred.block_pool's")
    empty = (counts == 0)[:, None, :, None, None]
    return torch.stack(pooled, 3).masked_fill(empty, 0), counts.int()


def block_score(
    q: Tensor,
    pooled: Tensor,
    counts: Tensor | None = None,
    rule: str = "dot",
    reduce: str = "none",
    scale: float | None = None,
) -> Tensor:
    """See tokred.block_score. The scores have the precision of the computation."""
    query = _wide(q)
    block = _per_query_head(_wide(pooled), q.shape[1])
    if rule == "dot":
        scores = query @ block[:, :, :, 0].transpose(2, 3)
    elif rule == "bounds":
        products = query[:, :, :, None, None, :] * block[:, :, None]
        scores = products.amax(4).sum(-1)
    elif rule == "deviation":
        mean, deviation = query.unbind(3)
        key, key_deviation = (t.transpose(2, 3) for t in block.unbind(3))
        scores = (deviation @ key).abs() + (mean @ key_deviation).abs()
    else:
        raise ValueError(f"rule {rule!r} is not one of tokred.block_score's")
    visible = torch.ones(1, pooled.shape[2], dtype=torch.bool, device=q.device)
    if counts is not None:
        visible = counts > 0
    scores = scores * _scale(scale, q.shape[-1])
    return _reduce_heads(scores, visible[:, None, None], pooled.shape[1], reduce)


def _logits(q: Tensor, k: Tensor, causal: bool, scale: float | None, mask: Tensor | None) -> Tensor:
    """[B, Hq, L, N], -inf where hidden."""
    key = _per_query_head(_wide(k), q.shape[1])
    logits = _scale(scale, q.shape[3]) * _wide(q) @ key.transpose(2, 3)
    visible = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        visible = visible & mask
    return logits.masked_fill(~visible, -torch.inf)


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where either is -inf."""
    hidden = (logits == -torch.inf) | (lse == -torch.inf)[..., None]
    return (logits - lse[..., None].to(logits.dtype)).exp().masked_fill(hidden, 0)


def _log_sum(logits: Tensor) -> Tensor:
    """logsumexp over the keys, -inf where there are none."""
    return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).logsumexp(-1)


def attention_rows(
    q: Tensor,
    k: Tensor,
    softmax: bool = True,
    denominator: tuple[int, int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """See tokred.attention_rows. The rows have the precision of the computation."""
    logits = _logits(q, k, causal, scale, mask)
    if not softmax:
        return logits
    first, last = (0, k.shape[2]) if denominator is None else denominator
    return _weights(logits, _log_sum(logits[..., first:last]))


def attention_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    reduce: str = "sum",
    weight: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """See tokred.attention_columns. The result has the precision of the computation."""
    logits = _logits(q, k, causal, scale, mask)
    received = _weights(logits, _log_sum(logits) if lse is None else lse)
    if weight is not None:
        received = received * weight[..., None].to(received.dtype)
    queries = q.shape[2]
    if reduce == "sum" or queries == 0:
        return received.sum(2)
    if reduce == "mean":
        return received.mean(2)
    if reduce == "max":
        return received.amax(2)
    if reduce == "variance":
        distance = received - received.mean(2, keepdim=True)
        return distance.square().sum(2) / max(queries - 1, 1)
    raise ValueError(f"reduce {reduce!r} is not one of tokred.attention_columns's")


def pagerank(
    q: Tensor,
    k: Tensor,
    iterations: int = 5,
    damping: float = 0.0,
    start: Tensor | None = None,
    lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """See tokred.pagerank. The result has the precision of the computation."""
    logits = _logits(q, k, causal, scale, mask)
    attention = _weights(logits, _log_sum(logits) if lse is None else lse)
    tokens = k.shape[2]
    uniform = attention.new_full((*q.shape[:2], tokens), 1 / max(tokens, 1))
    rank = uniform if start is None else start.to(attention.dtype).expand_as(uniform)
    for _ in range(iterations):
        received = (rank[:, :, None] @ attention)[:, :, 0]
        rank = (1 - damping) * received + damping * uniform
    return rank


def _energy(scores: Tensor, kind: str, margin: float) -> Tensor:
    if kind == "none":
        return torch.zeros_like(scores)
    if kind == "elu":
        distance = scores - margin
        return torch.where(distance >= 0, distance, distance.clamp(max=0).exp() - 1)
    if kind == "gaussian":
        width = 1 - margin
        return (-(((1 - scores) / width) ** 2) / 2).exp() / (width * math.sqrt(2 * math.pi))
    raise ValueError(f"energy {kind!r} is not one of tokred.similarity_stats's")


def similarity_stats(
    a: Tensor,
    b: Tensor | None = None,
    metric: str = "cosine",
    threshold: float = 0.0,
    energy: str = "none",
    margin: float = 0.0,
    exclude_self: bool = False,
    block_size: int = 0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See tokred.similarity_stats: mean, variance, largest, index, count and energy."""
    if b is None:
        b, mask_b = a, mask_a if mask_b is None else mask_b
    scores = similarity(a, b, metric)
    rows, columns = (torch.arange(n, device=a.device) for n in scores.shape[1:])
    partner = torch.ones_like(scores, dtype=torch.bool)
    if mask_a is not None:
        partner = partner & mask_a[:, :, None]
    if mask_b is not None:
        partner = partner & mask_b[:, None, :]
    if exclude_self:
        partner = partner & (rows[:, None] != columns)
    if block_size > 0:
        partner = partner & (rows[:, None] // block_size == columns // block_size)

    number = partner.sum(2).clamp(min=1)

    def mean_of(values: Tensor) -> Tensor:
        return values.masked_fill(~partner, 0).sum(2) / number

    mean = mean_of(scores)
    variance = mean_of((scores - mean[..., None]).square())
    count = ((scores > threshold) & partner).sum(2)

    rated = scores.masked_fill(~partner | scores.isnan(), -torch.inf)
    largest = torch.nn.functional.pad(rated, (0, 1), value=-torch.inf).amax(2)
    winner = torch.where(rated == largest[..., None], columns, len(columns))
    index = torch.nn.functional.pad(winner, (0, 1), value=len(columns)).amin(2)
    index = index.masked_fill(largest == -torch.inf, -1)
    mean_energy = mean_of(_energy(scores, energy, margin))
    return mean, variance, largest, index.int(), count.int(), mean_energy


def transition_stats(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """See tokred.transition_stats: ratio and cosine."""
    before, after = _wide(before), _wide(after)
    norm_before, norm_after = (t.norm(dim=-1) for t in (before, after))
    divisor = norm_before.clamp(min=NORM_EPS)
    dot = (before * after).sum(-1)
    return norm_after / divisor, dot / divisor / norm_after.clamp(min=NORM_EPS)
