"""Cases of the scores: of keys, blocks, attention and similarity."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch, flat
from draw import F32, FAR, Draw
from op_attention import bool_mask, qkv, seen_by
from op_matching import METRICS, magnitude, similarity
from torch import Tensor

REDUCES = ("none", "group_mean", "group_max", "head_mean", "softmax_vote")
_BATCHED = ("q", "k", "mask", "weight", "start", "lengths", "slots", "pooled", "counts")


def reduced(scores: Tensor, visible: Tensor, heads: int, reduce: str) -> Tensor:
    """Scores [B, Hq, .., N], hidden and reduced over the heads."""
    scores = scores.masked_fill(~visible, -torch.inf)
    groups = scores.unflatten(1, (heads, scores.shape[1] // heads))
    if reduce == "group_mean":
        return groups.sum(2) / groups.shape[2]
    if reduce == "group_max":
        return groups.amax(2)
    if reduce == "head_mean":
        return scores.sum(1, True) / scores.shape[1]
    if reduce == "none":
        return scores
    votes = (scores - scores.logsumexp(-1, True)).exp() if scores.shape[-1] else scores
    return votes.masked_fill(~visible, 0).sum(1, True)


def _product_slack(*factors: Tensor) -> float:
    largest = [float(x.double().abs().max()) for x in factors if x.numel()]
    return 3e-6 * (1 + math.prod(largest))


def key_scores(
    q: Tensor,
    k: Tensor,
    reduce: str,
    dims: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    (batch, heads, queries, dim), (_, key_heads, keys, _) = q.shape, k.shape
    mean = q.sum(2) / queries
    if slots is not None:
        visible = (slots >= 0) & (slots < keys)
        k = torch.nn.functional.pad(k[0], (0, 0, 0, 1))
        k = k[:, torch.where(visible, slots, keys).long()].transpose(0, 1)
        keys = slots.shape[1]
    else:
        visible = torch.ones(batch, keys, dtype=torch.bool)
    if lengths is not None:
        visible = visible & (torch.arange(keys) < lengths[:, None])
    visible = visible if mask is None else visible & mask
    k = k.repeat_interleave(heads // key_heads, 1)
    if dims is not None:
        times = torch.zeros(heads, dim + 1, dtype=q.dtype)
        valid = (dims >= 0) & (dims < dim)
        times.scatter_add_(1, torch.where(valid, dims, dim).long(), valid.to(q.dtype))
        mean = mean * times[:, :dim]
    scores = (k @ mean[..., None])[..., 0] * (dim**-0.5 if scale is None else scale)
    return reduced(scores, visible[:, None], key_heads, reduce)


@op_case
def qk_score(draw: Draw) -> Case:
    batch, (heads, key_heads) = draw.batch(), draw.heads()
    queries, keys, dim = draw.one_of(1, 1, 2, 3, 5, 17), draw.size(), draw.channels()
    dtype = draw.dtype()
    some: dict[str, Any] = {"q": draw.floats((batch, heads, queries, dim), dtype)}
    paged = draw.chance(0.3)
    some["k"] = draw.floats((1 if paged else batch, key_heads, keys, dim), dtype)
    some |= {"reduce": draw.choice(REDUCES), "scale": draw.scale()}
    if draw.chance(0.3):
        some["dims"] = draw.indices((heads, draw.one_of(1, 2, 5, 16, 33, 256)), dim)
    if draw.chance(0.4):
        some["lengths"] = draw.indices((batch,), keys)
    if paged:
        some["slots"] = draw.indices((batch, draw.size()), keys)
    if draw.chance(0.4):
        shape = draw.choice([1, batch]), (some["slots"].shape[1] if paged else keys)
        some["mask"] = draw.mask(shape)
    slack = _product_slack(some["q"], some["k"])
    batched = tuple(name for name in _BATCHED if not (paged and name == "k"))
    return Case("qk_score", some, key_scores if heads else None, slack, batched=batched,
                loose=("lengths", "mask"), dense=("dims",), refusable=not heads)  # fmt: skip


def pooled_blocks(
    x: Tensor,
    statistic: str,
    block_size: int = 0,
    boundaries: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, dim = x.shape
    if boundaries is None:
        starts = list(range(0, tokens, block_size))
        edges = torch.tensor([*starts, tokens])[None]
    else:
        edges = boundaries.clamp(0, tokens)
    blocks = edges.shape[1] - 1
    parts = 2 if statistic in ("min_max", "mean_deviation") else 1
    pooled = x.new_zeros(batch, heads, blocks, parts, dim)
    counts = torch.zeros(batch, blocks, dtype=torch.int32)
    for b in range(batch):
        there = torch.ones(tokens, dtype=torch.bool)
        if lengths is not None:
            there &= torch.arange(tokens) < lengths[b]
        if mask is not None:
            there &= mask[b % mask.shape[0]]
        row = edges[b % edges.shape[0]].tolist()
        for m, (first, last) in enumerate(pairwise(row)):
            inside = x[b, :, first:last][:, there[first:last]] if last > first else x[b, :, :0]
            counts[b, m] = inside.shape[1]
            if inside.shape[1]:
                pooled[b, :, m] = _statistic(inside, statistic)
    return pooled, counts


def _statistic(x: Tensor, statistic: str) -> Tensor:
    """The statistic of tokens [H, n, D], as [H, 1 or 2, D]."""
    mean = x.mean(1, True)
    if statistic == "min_max":
        return torch.cat([x.amin(1, True), x.amax(1, True)], 1)
    if statistic == "mean_deviation":
        return torch.cat([mean, (x - mean).abs().mean(1, True)], 1)
    return mean * math.sqrt(x.shape[1]) if statistic == "sqrt_mean" else mean


@op_case
def block_pool(draw: Draw) -> Case:
    batch, heads, tokens = draw.batch(), draw.one_of(0, 1, 2, 3), draw.size()
    x = draw.floats((batch, heads, tokens, draw.channels()), draw.dtype())
    spoiled = draw.chance(0.1)
    some: dict[str, Any] = {"x": draw.spoiled(x, 0.02) if spoiled else x}
    some["statistic"] = draw.choice(["mean", "sqrt_mean", "min_max", "mean_deviation"])
    if draw.chance():
        some["block_size"] = draw.choice([1, 2, 3, 16, 17, 64, tokens + 1, 2**62, FAR])
    else:
        shape = draw.choice([1, max(batch, 1)]), draw.one_of(1, 2, 3, 8, 20)
        edges = draw.indices(shape, tokens)
        some["boundaries"] = edges.sort(-1).values if draw.chance(0.6) else edges
    if draw.chance(0.4):
        some["lengths"] = draw.indices((batch,), tokens)
    if draw.chance(0.4):
        some["mask"] = draw.mask((draw.choice([1, batch]), tokens))
    plain, batched = None if spoiled else pooled_blocks, ("x", "boundaries", "lengths", "mask")
    return Case("block_pool", some, plain, 3e-6, batched=batched, loose=("lengths", "mask"))


def block_scores(
    q: Tensor,
    pooled: Tensor,
    rule: str,
    reduce: str,
    scale: float | None,
    counts: Tensor | None = None,
) -> Tensor:
    heads, dim = q.shape[1], q.shape[-1]
    block = pooled.repeat_interleave(heads // pooled.shape[1], 1)
    if rule == "dot":
        scores = q @ block[:, :, :, 0].mT
    elif rule == "bounds":
        smallest, largest = block.unbind(3)
        scores = q.clamp(min=0) @ largest.mT + q.clamp(max=0) @ smallest.mT
    else:
        (mean, deviation), (key, key_deviation) = q.unbind(3), block.unbind(3)
        scores = (deviation @ key.mT).abs() + (mean @ key_deviation.mT).abs()
    visible = torch.ones(1, pooled.shape[2], dtype=torch.bool) if counts is None else counts > 0
    scores = scores * (dim**-0.5 if scale is None else scale)
    return reduced(scores, visible[:, None, None], pooled.shape[1], reduce)


@op_case
def block_score(draw: Draw) -> Case:
    batch, (heads, key_heads), queries = draw.batch(), draw.heads(), draw.queries()
    blocks, dim = draw.size((0, 1, 2, 3, 7, 16, 17, 33, 64, 65)), draw.channels()
    rule = draw.choice(["dot", "bounds", "deviation"])
    statistics = 1 if rule == "dot" else 2
    if rule == "deviation":
        q = draw.floats((batch, heads, queries, 2, dim))
    else:
        q = draw.floats((batch, heads, queries, dim), draw.dtype())
    pooled = draw.floats((batch, key_heads, blocks, statistics, dim), draw.dtype())
    if rule == "bounds":
        pooled = pooled.sort(3).values.contiguous()
    some: dict[str, Any] = {"q": q, "pooled": pooled, "rule": rule}
    some |= {"reduce": draw.choice(REDUCES), "scale": draw.scale()}
    if draw.chance(0.4):
        some["counts"] = draw.indices((draw.choice([1, batch]), blocks), 5)
    dense = () if rule == "dot" else ("q", "pooled")
    return Case("block_score", some, block_scores if heads else None, _product_slack(q, pooled),
                batched=_BATCHED, dense=dense, refusable=not heads)  # fmt: skip


def weights(
    q: Tensor,
    k: Tensor,
    causal: bool,
    scale: float | None,
    mask: Tensor | None,
    among: slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """Logits, -inf where hidden, and their softmax over some of the keys, for all of them."""
    seen = seen_by(q.shape[2], k.shape[2], causal, mask)
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen, -torch.inf)
    chosen = torch.nn.functional.pad(logits[..., among], (0, 1), value=-torch.inf)
    log_sum = chosen.logsumexp(-1, True)
    share = (logits - log_sum).exp().masked_fill(~seen | (log_sum == -torch.inf), 0)
    return logits, share


def _of_queries(draw: Draw, square: bool = False) -> tuple[dict[str, Any], int]:
    some: dict[str, Any] = qkv(draw, double=False)
    del some["v"]
    q, k = some["q"], some["k"]
    if square:
        some["q"] = q = draw.floats((*q.shape[:2], k.shape[2], q.shape[3]), q.dtype)
    some |= {"causal": draw.chance(0.4), "scale": draw.scale()}
    if draw.chance(0.4):
        some["mask"] = bool_mask(draw, q, k.shape[2])
    return some, k.shape[2]


@op_case
def attention_rows(draw: Draw) -> Case:
    some, keys = _of_queries(draw)
    some["softmax"] = draw.chance(0.7)
    if draw.chance(0.3):
        first = draw.randrange(keys + 1)
        some["denominator"] = first, draw.choice([None, draw.randrange(first, keys + 1)])

    def plain(
        softmax: bool,
        denominator: tuple[int, int | None] | None = None,
        mask: Any = None,
        **rest: Any,
    ) -> Tensor:
        logits, share = weights(**rest, mask=mask, among=slice(*(denominator or (0, None))))
        # A quotient by what is not in the denominator may be any number: as precise as its log.
        return share.clamp(max=1e3) if softmax else logits

    def bounded(out: Tensor) -> Tensor:
        return out.clamp(max=1e3) if some["softmax"] else out

    return Case("attention_rows", some, plain, 1e-5, batched=_BATCHED, loose=("mask",),
                measure=bounded, refusable=not some["q"].shape[1])  # fmt: skip


def _lse_slack(q: Tensor, k: Tensor, causal: bool, scale: float | None, **_: Any) -> float:
    """1e-5, or four units in the last place of the largest logit.

    The softmax's sum of a query is one fp32 number, which rounds like the logits it stands for.
    """
    logits = weights(q.double(), k.double(), causal, scale, None)[0]
    largest = logits[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 0.0
    return max(1e-5, 4 * torch.finfo(F32).eps * largest)


@op_case
def attention_columns(draw: Draw) -> Case:
    some, _ = _of_queries(draw)
    some["reduce"] = draw.choice(["sum", "mean", "max", "variance"])
    batch, heads, queries, _ = some["q"].shape
    if draw.chance(0.4):
        shape = draw.choice([1, batch]), draw.choice([1, heads]), queries
        some["weight"] = draw.floats(shape, F32, plain=True)

    def plain(reduce: str, weight: Any = None, mask: Any = None, **rest: Any) -> Tensor:
        share = weights(**rest, mask=mask)[1]
        share = share if weight is None else share * weight[..., None]
        if not queries or reduce == "sum":
            return share.sum(2)
        if reduce == "variance":
            return (share - share.mean(2, True)).square().sum(2) / max(queries - 1, 1)
        return share.mean(2) if reduce == "mean" else share.amax(2)

    slack = _lse_slack(**some) if heads else 1e-5
    return Case("attention_columns", some, plain, slack, batched=_BATCHED,
                loose=("mask", "weight"), refusable=not heads)  # fmt: skip


@op_case
def pagerank(draw: Draw) -> Case:
    some, tokens = _of_queries(draw, square=True)
    some |= {"iterations": draw.one_of(1, 2, 3, 5), "damping": draw.choice([0.0, 0.15, 1.0])}
    batch, heads, *_ = some["q"].shape
    if draw.chance(0.4):
        shape = draw.choice([1, batch]), draw.choice([1, heads]), tokens
        some["start"] = draw.floats(shape, F32, plain=True)

    def plain(
        iterations: int, damping: float, start: Any = None, mask: Any = None, **rest: Any
    ) -> Tensor:
        share = weights(**rest, mask=mask)[1]
        rank = share.new_full((batch, heads, tokens), 1 / max(tokens, 1))
        even, rank = rank, rank if start is None else start.expand_as(rank)
        for _ in range(iterations):
            rank = (1 - damping) * (rank[:, :, None] @ share)[:, :, 0] + damping * even
        return rank

    slack = _lse_slack(**some) if heads else 1e-5
    return Case("pagerank", some, plain, slack, batched=_BATCHED, loose=("mask", "start"),
                refusable=not heads)  # fmt: skip


@op_case
def similarity_stats(draw: Draw) -> Case:
    batch, rows, columns = draw.batch(), draw.size(), draw.size()
    channels, dtype = draw.size((0, 1, 2, 3, 8, 15, 16, 17, 33, 64, 65, 100, 129)), draw.dtype()
    some: dict[str, Any] = {"a": draw.floats((batch, rows, channels), dtype)}
    if draw.chance(0.7):
        some["b"] = draw.floats((batch, columns, channels), dtype)
    columns = some.get("b", some["a"]).shape[1]
    spoiled = draw.chance(0.15)
    if spoiled:
        some["a"] = draw.spoiled(some["a"], 0.02)
    some |= {
        "metric": draw.choice(METRICS),
        "threshold": draw.choice([0.0, 0.3, -math.inf, math.inf]),
        "energy": draw.choice(["none", "elu", "gaussian"]),
        "margin": draw.choice([0.0, 0.3, -1.0, 0.9]),
        "exclude_self": draw.chance(),
        "block_size": draw.choice([0, 0, 1, 3, 16, 64, 2**62, FAR]),
    }
    for name, count in (("mask_a", rows), ("mask_b", columns)):
        if draw.chance(0.4):
            some[name] = draw.mask((batch, count))

    def check(out: Any) -> None:
        index = flat(out)[3]
        if ((index < -1) | (index >= max(columns, 1))).any():
            raise Mismatch("an index out of range")

    largest = float(some["a"].double().abs().max()) if some["a"].numel() else 0.0
    wild = spoiled or (some["metric"] in ("dot", "l2") and largest > 20)
    slack = 1e-5 * magnitude(some["a"].double(), some.get("b", some["a"]).double(), some["metric"])
    masks = ("mask_a", "mask_b")
    return Case("similarity_stats", some, None if wild else similarities, slack, check=check,
                batched=("a", "b", *masks), loose=masks, measure=_without_index)  # fmt: skip


def _without_index(out: Any) -> list[Tensor]:
    """What has one right value where similarities are nearly equal."""
    mean, variance, largest, _, _, energy = flat(out)
    return [mean, variance.clamp(min=0).sqrt(), largest, energy]


def similarities(
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
) -> list[Tensor]:
    if b is None:
        b, mask_b = a, mask_a if mask_b is None else mask_b
    scores = similarity(a, b, metric)
    partner = torch.ones_like(scores, dtype=torch.bool)
    partner = partner if mask_a is None else partner & mask_a[:, :, None]
    partner = partner if mask_b is None else partner & mask_b[:, None]
    row, column = torch.arange(a.shape[1])[:, None], torch.arange(b.shape[1])
    partner = partner & (row != column) if exclude_self else partner
    partner = partner & (row // block_size == column // block_size) if block_size else partner
    count = partner.sum(2)

    def mean_of(x: Tensor) -> Tensor:
        return x.masked_fill(~partner, 0).sum(2) / count.clamp(min=1)

    mean = mean_of(scores)
    spread = mean_of((scores - mean[..., None]).square()).sqrt()
    hidden = scores.masked_fill(~partner, -torch.inf)
    largest = torch.nn.functional.pad(hidden, (0, 1), value=-torch.inf).amax(2)
    rated = torch.zeros_like(scores)
    if energy == "elu":
        rated = torch.nn.functional.elu(scores - margin)
    elif energy == "gaussian":
        width = 1 - margin
        rated = (-(((1 - scores) / width) ** 2) / 2).exp() / (width * math.sqrt(2 * math.pi))
    return [mean, spread, largest, mean_of(rated)]


@op_case
def transition_stats(draw: Draw) -> Case:
    shape, dtype = (draw.batch(), draw.size(), draw.size()), draw.dtype()
    some = {"before": draw.floats(shape, dtype), "after": draw.floats(shape, dtype)}

    def plain(before: Tensor, after: Tensor) -> list[Tensor]:
        norms = [x.norm(dim=-1) for x in (before, after)]
        floors = [n.clamp(min=1e-12) for n in norms]
        cosine = (before * after).sum(-1) / floors[0] / floors[1]
        return [(norms[1] / floors[0]).clamp(max=1e6), cosine]

    def bounded(out: Any) -> list[Tensor]:
        return [out[0].clamp(max=1e6), out[1]]

    return Case("transition_stats", some, plain, batched=tuple(some), measure=bounded)
