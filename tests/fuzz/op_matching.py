"""Cases of match, bipartite_soft_matching and threshold_matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch, bits, flat
from draw import FAR, Draw
from torch import Tensor

import tokred

METRICS = ("cosine", "dot", "l2", "half_cosine")
_CHANNELS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 64, 65, 100, 128, 129, 300)


def similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """[B, Na, Nb], at the precision of a and b."""
    dot = a @ b.mT
    if metric == "dot":
        return dot
    if metric == "l2":
        return 2 * dot - (a * a).sum(-1)[..., None] - (b * b).sum(-1)[:, None]
    norms = [x.norm(dim=-1).clamp(min=1e-12) for x in (a, b)]
    cosine = dot / norms[0][..., None] / norms[1][:, None]
    return (1 + cosine) / 2 if metric == "half_cosine" else cosine


def magnitude(a: Tensor, b: Tensor, metric: str) -> float:
    """What the rounding of a similarity is relative to."""
    if metric in ("cosine", "half_cosine") or not a.numel() or not b.numel():
        return 1.0
    squares = [float((x * x).sum(-1).max()) for x in (a, b)]
    return float((a.abs() @ b.abs().mT).max()) + sum(squares)


@op_case
def match(draw: Draw) -> Case:
    batch, rows, columns, channels = draw.batch(), draw.size(), draw.size(), draw.size(_CHANNELS)
    dtype = draw.dtype()
    a, b = (draw.floats((batch, count, channels), dtype) for count in (rows, columns))
    if rows and columns and draw.chance(0.3):
        b = a[:, torch.randint(0, rows, (columns,), generator=draw.generator())].clone()
    spoiled = draw.chance(0.2)
    if spoiled:
        a, b = draw.spoiled(a), draw.spoiled(b)
    some: dict[str, Any] = {"a": a, "b": b, "metric": draw.choice(METRICS)}
    some["band"] = draw.choice([-1, -1, 0, 1, 5, 64, 2**31, FAR])
    for name, count in (("a", rows), ("b", columns)):
        if draw.chance(0.4):
            some[f"mask_{name}"] = draw.mask((batch, count))
        if draw.chance(0.3):
            some[f"weight_{name}"] = draw.floats((batch, count))
    if draw.chance(0.4):
        some["k"] = draw.choice([2, 3, 8, 16, columns + 2])
    check = _in_range(columns) if spoiled else lambda out: _check_match(some, out)
    extras = ("mask_a", "mask_b", "weight_a", "weight_b")
    return Case("match", some, check=check, batched=("a", "b", *extras), loose=extras)


def _in_range(columns: int) -> Any:
    def check(out: Any) -> None:
        score, index = out
        if (score.diff(dim=-1).nan_to_num() > 0).any() and score.dim() == 3:
            raise Mismatch("the k best are not in order")
        if score.isnan().any() or ((index < -1) | (index >= columns)).any():
            raise Mismatch("a NaN score, or an index out of range")

    return check


def _check_match(some: dict[str, Any], out: Any) -> None:
    a, b = some["a"].double(), some["b"].double()
    (rows, columns), channels = (a.shape[1], b.shape[1]), a.shape[2]
    scores = similarity(a, b, some["metric"])
    allowed = 2e-6 * magnitude(a, b, some["metric"]) * (1 + channels / 64)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    for name, dim in (("a", 2), ("b", 1)):
        if f"weight_{name}" in some:
            weight = some[f"weight_{name}"].double()
            scores = scores * weight.unsqueeze(dim)
            allowed *= float(weight.abs().max()) if weight.numel() else 1.0
        if f"mask_{name}" in some:
            hidden = hidden | ~some[f"mask_{name}"].unsqueeze(dim)
    if some["band"] >= 0:
        far = (torch.arange(rows)[:, None] - torch.arange(columns)).abs() > some["band"]
        hidden = hidden | far
    scores = scores.masked_fill(hidden, -math.inf)
    k = some.get("k", 1)
    best = torch.nn.functional.pad(scores, (0, k), value=-math.inf).topk(k).values
    score, index = (t.unflatten(-1, (-1, 1)) if k == 1 else t for t in out)
    lonely = best == -math.inf
    if not torch.equal(index == -1, lonely) or not (score[lonely] == -math.inf).all():
        raise Mismatch("rows without a partner are others")
    if lonely.all():
        return
    if (torch.where(index < 0, -1 - torch.arange(k), index).sort().values.diff() == 0).any():
        raise Mismatch("a partner comes twice")
    chosen = scores.gather(2, index.long().clamp(min=0))
    errors = [(x - best)[~lonely].abs().max().item() for x in (chosen, score.double())]
    if not max(errors) <= allowed + 1e-30:
        raise Mismatch(f"the chosen is off by {errors[0]:.3g}, its score by {errors[1]:.3g}, "
                       f"allowed {allowed:.3g}")  # fmt: skip
    if channels:
        _check_ties(some, hidden, index[..., 0])


def _check_ties(some: dict[str, Any], hidden: Tensor, index: Tensor) -> None:
    """The first of equal rows is chosen."""
    b, weight = some["b"], some.get("weight_b")
    equal = (bits(b)[:, :, None] == bits(b)[:, None]).all(-1)
    if weight is not None:
        equal &= weight[:, :, None] == weight[:, None]
    chosen = index.long().clamp(min=0)
    rivals = equal.gather(1, chosen[..., None].expand(-1, -1, b.shape[1])) & ~hidden
    first = rivals.int().argmax(-1)
    wrong = (index >= 0) & (first != index)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Mismatch(f"row {at} chose {index[at]}, and {first[at]} is equal and earlier")


@dataclass
class _Item:
    """One item of the batch as the plan sees it: token numbers, and a score for every source."""

    tokens: int
    prefix: int
    ascending: bool  # survivors keep their order
    sources: list[int]
    destinations: list[int]
    masked: list[bool]
    partner: list[int]  # of every source, -1 for none
    score: list[float]


def _plan(item: _Item, order: str, limit: int, threshold: float | None) -> tuple[list[int], int]:
    """The map of an item and its number of slots, step by step as the documentation says."""
    fixed = {*range(item.prefix), *item.destinations}
    place: dict[int, int] = {}
    for at, token in enumerate(item.sources):
        if 0 <= token < item.tokens and token not in fixed:
            place.setdefault(token, at)

    def rank(token: int) -> tuple[int, float, int]:
        at = place[token]
        if item.partner[at] >= 0:
            return 0, -item.score[at], at
        return (1 if item.masked[token] else 2), 0.0, at

    ranked = sorted(place, key=rank)
    gone: set[int] = set()
    if threshold is not None:
        gone = {token for token in range(item.tokens) if item.masked[token]}
        strong = [t for t in ranked if item.partner[place[t]] >= 0]
        ranked_out = [t for t in strong if item.score[place[t]] > threshold][:limit]
    else:
        ranked_out = ranked[:limit]
    home = list(range(item.tokens))
    for token in ranked_out:
        home[token] = item.partner[place[token]]
    staying = [t for t in ranked if t not in set(ranked_out)]
    staying = sorted(staying, key=place.__getitem__) if item.ascending else staying
    ends = [t for t in item.destinations if item.prefix <= t < item.tokens]
    named = {*range(item.prefix), *place, *ends}
    others = [t for t in range(item.tokens) if t not in named]
    sequence = [*range(item.prefix), *others, *staying, *ends]
    sequence = home if order == "position" else sequence
    slots: dict[int, int] = {}
    for token in sequence:
        if token >= 0 and token not in gone:
            slots.setdefault(token, len(slots))
    room = len(slots) if threshold is not None else item.tokens - limit
    mapped = [slots.get(token, -1) for token in home]
    return [slot if slot < room else -1 for slot in mapped], len(slots)


def _expected(some: dict[str, Any], threshold: float | None) -> tuple[Tensor, Tensor] | None:
    """Map and slots, or None where nearly equal scores leave the plan open."""
    metric, mask = some["metric"].double(), some.get("mask")
    batch, tokens, _ = metric.shape
    prefix = min(some["num_prefix"], tokens)
    free = list(range(prefix, tokens))
    maps, counts = [], []
    for b in range(batch):
        sides = {}
        for name, parity in (("sources", 0), ("destinations", 1)):
            side = some.get(name)
            if side is None:
                sides[name] = [t for t in free if t % 2 == parity]
            else:
                sides[name] = (side if side.dim() == 1 else side[b % side.shape[0]]).tolist()
        sources, ends = sides["sources"], sides["destinations"]
        if "sources" not in some and "destinations" in some:
            return None  # which tokens are sources then is the wrapper's business
        limit = len(sources) if "sources" in some else len(free) // 2
        limit = min(limit, some.get("r", limit))
        masked = [False] * tokens if mask is None else (~mask[b]).tolist()
        found = _partners(metric[b], sources, ends, masked)
        if found is None or _open(found[1], threshold):
            return None
        item = _Item(tokens, prefix, some["num_prefix"] > 0, sources, ends, masked, *found)
        slots, count = _plan(item, some["order"], limit, threshold)
        maps.append(slots)
        counts.append(count)
    expected = torch.tensor(maps, dtype=torch.int32).reshape(batch, tokens)
    return expected, torch.tensor(counts, dtype=torch.int32)


_UNSURE = 2e-6  # cosines nearer than this may come in any order


def _partners(
    x: Tensor, sources: list[int], ends: list[int], masked: list[bool]
) -> tuple[list[int], list[float]] | None:
    """The best destination of every source and its cosine; None where two are nearly equal."""
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    there = [t for t in ends if 0 <= t < len(masked) and not masked[t]]
    partner, score = [], []
    for token in sources:
        if not 0 <= token < len(masked) or masked[token] or not there:
            partner.append(-1)
            score.append(-math.inf)
            continue
        cosine = unit[there] @ unit[token]
        best = float(cosine.max())
        rivals = {t for t, c in zip(there, cosine.tolist(), strict=True) if c > best - _UNSURE}
        if len(rivals) > 1:
            return None
        partner.append(rivals.pop())
        score.append(best)
    return partner, score


def _open(score: list[float], threshold: float | None) -> bool:
    ranked = sorted(s for s in score if s > -math.inf)
    near = any(b - a < _UNSURE for a, b in pairwise(ranked))
    return near or (threshold is not None and any(abs(s - threshold) < _UNSURE for s in ranked))


def _bipartite(draw: Draw, by_threshold: bool) -> Case:
    batch, n = draw.batch(), draw.size()
    metric = draw.floats((batch, n, draw.size((1, 2, 3, 8, 16, 17, 33, 64, 100))), draw.dtype())
    spoiled = draw.chance(0.2)
    metric = draw.spoiled(metric) if spoiled else metric
    some: dict[str, Any] = {"metric": metric, "order": draw.choice(["tome", "position"])}
    some["num_prefix"] = draw.choice([0, 0, 1, 2, 5, n, n + 3, FAR])
    threshold = draw.choice([0.0, 0.5, 0.9, -1.0, 1.0, -2.0, math.inf, -math.inf])
    if by_threshold:
        some["threshold"] = threshold
    else:
        some["r"] = draw.choice([0, 1, 2, n // 4, n // 2, n, FAR])
    if draw.chance(0.4):
        some["mask"] = draw.mask((batch, n))
    if draw.chance(0.35) and n and some["num_prefix"] < FAR:
        counts = [draw.one_of(0, 1, 2, 3, 8, 17, 40) for _ in range(2)]
        if draw.chance():
            rows = draw.choice([1, max(batch, 1)])
            sides = [draw.indices((rows, count), n) for count in counts]
        else:
            shuffled = torch.randperm(n, generator=draw.generator()).int()
            sides = [shuffled[: counts[0]], shuffled[counts[0] : sum(counts)]]
        some["sources"], some["destinations"] = (side.contiguous() for side in sides)

    def check(out: Any) -> None:
        token_map, *counts = flat(out)
        slots = some["metric"].shape[1]
        if not by_threshold:
            sides = some.get("sources"), some.get("destinations")
            slots = tokred.num_out(n, some["r"], some["num_prefix"], *sides)
        elif any(_used(row) != int(c) for row, c in zip(token_map, counts[0], strict=True)):
            raise Mismatch("the slots are not those that are counted")
        if ((token_map < -1) | (token_map >= max(slots, 1))).any():
            raise Mismatch("a slot out of range")
        wanted = None if spoiled else _expected(some, threshold if by_threshold else None)
        for number, (a, e) in enumerate(zip([token_map, *counts], wanted or (), strict=False)):
            if not torch.equal(a, e):
                at = tuple((a != e).nonzero()[0].tolist())
                raise Mismatch(f"result {number} at {at}: {a[at]} is not {e[at]}")

    sides = tuple(name for name in ("sources", "destinations") if some.get(name, metric).dim() == 2)
    name = "threshold_matching" if by_threshold else "bipartite_soft_matching"
    return Case(name, some, check=check, batched=("metric", "mask", *sides), loose=("mask",))


def _used(row: Tensor) -> int:
    """How many slots a map uses, -2 if they are not the first ones."""
    slots = sorted({int(slot) for slot in row if slot >= 0})
    return len(slots) if slots == list(range(len(slots))) else -2


@op_case
def bipartite_soft_matching(draw: Draw) -> Case:
    return _bipartite(draw, False)


@op_case
def threshold_matching(draw: Draw) -> Case:
    return _bipartite(draw, True)
