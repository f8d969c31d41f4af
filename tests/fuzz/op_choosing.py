"""Cases of topk, compact, gather_tokens and inverse_transform_sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch, same
from draw import BF16, F16, F32, F64, FAR, Draw
from torch import Tensor

_ROWS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 255, 256, 257, 300)
_LONG_ROWS = (500, 1000, 1023, 1025, 2049, 4097)
_ONE = 2**40  # probabilities are summed in fixed point


def _row(draw: Draw) -> int:
    return draw.choice(_LONG_ROWS if not draw.small and draw.chance(0.15) else _ROWS)


def _scores(draw: Draw, lead: list[int], columns: int) -> Tensor:
    x = draw.floats((*lead, columns), draw.dtype())
    if columns and draw.chance(0.3):
        x = (x.float() * 3).softmax(-1).to(x.dtype)
    return draw.spoiled(x) if draw.chance(0.25) else x


def _of_rows(table: Tensor | None, lead: list[int], otherwise: int) -> list[int]:
    rows = math.prod(lead)
    return [otherwise] * rows if table is None else table.expand(lead).reshape(rows).tolist()


def _cut(row: list[int], score: list[float], top_p: float | None, min_k: int) -> list[int]:
    """The first places whose probabilities exceed top_p, at least min_k."""
    if top_p is None:
        return row
    limit = math.floor(min(max(top_p, -1.0), 2.0**20) * _ONE)
    total = 0
    for count, place in enumerate(row, 1):
        value = score[place]
        total += int(min(max(0.0 if math.isnan(value) else value, 0.0), 2.0**20) * _ONE)
        if total > limit:
            return row[: max(count, min_k)]
    return row


def topk_by_sorting(
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
    """topk_with_counts, row by row with Python's sort."""
    lead, columns = list(scores.shape[:-1]), scores.shape[-1]
    rows = math.prod(lead)
    width = block_size or max(columns, 1)
    segments = max(1, -(-columns // width))
    values = torch.full((rows, segments, k), -math.inf)
    indices = torch.full((rows, segments, k), -1, dtype=torch.int32)
    counts = torch.zeros(rows, segments, dtype=torch.int32)
    table = scores.float().nan_to_num(-math.inf, math.inf, -math.inf).reshape(rows, columns)
    kept = torch.zeros(1, dtype=torch.bool) if must_keep is None else must_keep
    kept = kept.expand(*lead, columns).reshape(rows, columns)
    bound = -math.inf if threshold is None else torch.tensor(threshold, dtype=F32).item()
    limits = zip(_of_rows(lengths, lead, columns), _of_rows(row_k, lead, k), strict=True)
    for row, (length, budget) in enumerate(limits):
        length, budget = min(max(length, 0), columns), min(max(budget, 0), k)
        score, keep = table[row].tolist(), kept[row].tolist()
        for segment in range(segments):
            ranked = []
            for j in range(segment * width, min((segment + 1) * width, length)):
                forced = j < num_sinks or j >= length - num_locals or keep[j]
                if forced or score[j] > bound:
                    ranked.append((not forced, -score[j], j))
            chosen = _cut([j for *_, j in sorted(ranked)[:budget]], score, top_p, min_k)
            chosen = sorted(chosen) if order == "position" else chosen
            counts[row, segment] = len(chosen)
            indices[row, segment, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            values[row, segment, : len(chosen)] = table[row, chosen]
    shape = [*lead, segments] if block_size else lead
    return values.reshape(*shape, k), indices.reshape(*shape, k), counts.reshape(shape)


@op_case
def topk(draw: Draw) -> Case:
    lead, n = draw.leading(), _row(draw)
    k = draw.choice([0, 1, 2, 3, 8, 16, 17, n, n + 3, 2 * n + 1, n // 2, draw.randrange(n + 5)])
    some: dict[str, Any] = {"scores": _scores(draw, lead, n), "k": k}
    some["order"] = draw.choice(["score", "position"])
    if draw.chance(0.4):
        some["lengths"] = draw.indices(draw.shared(lead), n)
    if draw.chance(0.3):
        some["row_k"] = draw.indices(draw.shared(lead), k)
    for name in ("num_sinks", "num_locals"):
        if draw.chance(0.3):
            some[name] = draw.choice([1, 2, 4, n, n + 1, k, 2**62, FAR])
    if draw.chance(0.3):
        some["must_keep"] = draw.mask((*draw.shared(lead), n))
    if draw.chance(0.35):
        some["top_p"] = draw.choice([-1.0, 0.0, 0.3, 0.5, 0.9, 0.999, 1.0, 5.0, 1e9, -1e300])
    if draw.chance(0.2):
        some["min_k"] = draw.choice([0, 1, 3, k, FAR])
    if draw.chance(0.3):
        some["threshold"] = draw.choice([0.0, -0.0, 0.5, -math.inf, math.inf, 1e300, -1e300, 0.1])
    if draw.chance(0.3):
        some["block_size"] = draw.choice([1, 2, 7, 16, 64, 100, n + 1, max(1, n), 2**40, FAR])
        if k * (n // some["block_size"]) > 100_000:
            some["k"] = 3
            some.pop("row_k", None)

    def check(out: Any) -> None:
        expected = topk_by_sorting(**some)
        # -0 is chosen as 0 is, and stays what it was.
        same([out[0] + 0.0, *out[1:]], [expected[0] + 0.0, *expected[1:]], "against sorting")

    batched = ("scores", "lengths", "row_k", "must_keep") if lead else ()
    return Case("topk_with_counts", some, check=check, batched=batched, loose=("lengths", "row_k"))


@op_case
def compact(draw: Draw) -> Case:
    lead, n = draw.leading(), _row(draw)
    some: dict[str, Any] = {}
    kind = draw.choice(["mask", "list", "scores"])
    if kind == "mask":
        some["selected"] = draw.mask((*lead, n))
    elif kind == "list":
        some["selected"] = draw.indices((*lead, n), n)
    else:
        some["selected"] = _scores(draw, lead, n)
        some["threshold"] = draw.choice([0.0, 0.5, -math.inf, math.inf, 1e300])
    if draw.chance():
        some["capacity"] = draw.choice([0, 1, n, n + 7, n // 2, 5])
    if draw.chance():
        some["lengths"] = draw.indices(draw.shared(lead), n)

    def check(out: Any) -> None:
        rows, places = math.prod(lead), some.get("capacity", n)
        selected = some["selected"]
        if kind == "list":
            selected = selected >= 0
        elif kind == "scores":
            selected = selected.float() > torch.tensor(some["threshold"], dtype=F32)
        indices = torch.full((rows, places), -1, dtype=torch.int32)
        counts = torch.zeros(rows, dtype=torch.int32)
        lengths = _of_rows(some.get("lengths"), lead, n)
        for row, length in enumerate(lengths):
            found = selected.reshape(rows, n)[row, : min(max(length, 0), n)].nonzero()[:places, 0]
            if kind == "list":
                found = some["selected"].reshape(rows, n)[row, found]
            indices[row, : len(found)] = found.int()
            counts[row] = len(found)
        same(out, (indices.reshape(*lead, places), counts.reshape(lead)), "against nonzero")

    batched = ("selected", "lengths") if lead else ()
    return Case("compact", some, check=check, batched=batched, loose=("lengths",))


@op_case
def gather_tokens(draw: Draw) -> Case:
    batch, heads, tokens, count = draw.batch(), draw.one_of(1, 2, 3), draw.size(), draw.size()
    per_head = draw.chance(0.4)
    indices = draw.indices((batch, heads, count) if per_head else (batch, count), tokens)
    dtypes = [F32, F16, BF16, F64, torch.int64, torch.uint8, torch.bool, torch.int16]
    tensors, dims = [], []
    for _ in range(draw.choice([1, 1, 2, 3, 16])):
        dim = 2 if per_head or draw.chance() else 1
        tail = [draw.one_of(1, 1, 2, 3, 5, 7, 16, 33) for _ in range(draw.one_of(0, 1, 1, 2))]
        shape = (batch, heads, tokens) if dim == 2 else (batch, tokens)
        x = torch.randint(-100, 100, (*shape, *tail), generator=draw.generator())
        tensors.append(x.to(draw.choice(dtypes)))
        dims.append(dim)

    def check(out: Any) -> None:
        for x, dim, got in zip(tensors, dims, out, strict=True):
            shape = (*x.shape[:dim], count, *x.shape[dim + 1 :])
            expected = torch.zeros(shape, dtype=x.dtype)
            for b in range(batch):
                for h in range(heads if dim == 2 else 1):
                    row = indices[b, h] if per_head else indices[b]
                    here = ((row >= 0) & (row < tokens)).nonzero()[:, 0]
                    source, target = (x[b], expected[b]) if dim == 1 else (x[b, h], expected[b, h])
                    target[here] = source[row[here].long()]
            same(got, expected, "against indexing")

    some = {"tensors": tensors, "indices": indices, "token_dims": dims}
    return Case("gather_tokens", some, check=check, batched=("tensors", "indices"))


@op_case
def inverse_transform_sample(draw: Draw) -> Case:
    lead = draw.leading()
    n = draw.one_of(0, 1, 2, 3, 7, 16, 17, 64, 100, 129, 256, 257)
    scores = draw.floats((*lead, n), draw.dtype())
    scores = scores.abs() if draw.chance(0.8) else scores
    spoiled = draw.chance(0.25)
    scores = draw.spoiled(scores) if spoiled else scores
    some: dict[str, Any] = {"scores": scores}
    some["num_samples"] = draw.choice([0, 1, 2, 3, 8, 17, n, n + 5, 300])
    if draw.chance():
        some["mask"] = draw.mask((*draw.shared(lead), n))

    def check(out: Any) -> None:
        rows, samples = math.prod(lead), some["num_samples"]
        mask = some.get("mask", torch.ones(1, dtype=torch.bool)).expand(*lead, n).reshape(rows, n)
        clean = scores.double().nan_to_num(0, torch.finfo(F32).max, 0).clamp(min=0)
        picks, counts = out[0].reshape(rows, samples), out[1].reshape(rows)
        for row in range(rows):
            count = int(counts[row])
            if (picks[row, count:] != -1).any():
                raise Mismatch("a pick behind the count")
            _check_samples(clean.reshape(rows, n)[row], mask[row], picks[row, :count], samples)

    batched = ("scores", "mask") if lead else ()
    return Case("inverse_transform_sample", some, check=check, batched=batched)


def _check_samples(score: Tensor, mask: Tensor, picks: Tensor, samples: int) -> None:
    """Whether the picks are those nearest to even steps of the cumulative score."""
    there = mask.nonzero()[:, 0]
    if not len(there) or not samples:
        if len(picks):
            raise Mismatch("a pick of nothing")
        return
    order = there[score[there].sort(stable=True).indices]
    rank = {int(token): place for place, token in enumerate(order)}
    places = [rank.get(int(token), -1) for token in picks]
    if places != sorted(set(places)) or -1 in places or not places:
        raise Mismatch(f"picks {picks.tolist()} are masked, repeated or not in order")
    share = score[order] / score[order].max().clamp(min=torch.finfo(F64).tiny)
    total = share.masked_fill(share < 1 / _ONE, 0).cumsum(0)  # what fixed point does not see
    span = (total[-1] - total[0]).clamp(min=torch.finfo(F64).tiny)
    curve = (total - total[0]) / span
    if not (curve > 0).any():
        return
    start = curve[curve > 0][0]
    wanted = start + torch.arange(samples) * (1 - start) / max(samples - 1, 1)
    distance = (wanted[:, None] - curve).abs()
    near = distance <= distance.amin(1, keepdim=True) + 1e-6
    picked = near[:, places]
    if not picked.any(1).all() or not picked.any(0).all():
        raise Mismatch(f"picks {picks.tolist()} are not those nearest to the steps")
