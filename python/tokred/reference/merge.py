"""Applying a map, in plain torch. Differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "adjacent_runs",
    "compose",
    "ema_scan",
    "forest_merge",
    "forest_roots",
    "merge",
    "segment_pool",
    "segment_weights",
    "unmerge",
]


def _slots(token_map: Tensor, num_out: int) -> Tensor:
    """token_map as i64, with slot num_out for every entry outside [0, num_out)."""
    inside = (token_map >= 0) & (token_map < num_out)
    return torch.where(inside, token_map, num_out).long()


def _sum(values: Tensor, slots: Tensor, num_out: int) -> Tensor:
    """Sums values [B, N] or [B, N, C] by slot, leaving out the last."""
    shape = (values.shape[0], num_out + 1, *values.shape[2:])
    index = slots.reshape(*slots.shape, *[1] * (values.dim() - 2)).expand_as(values)
    return values.new_zeros(shape).scatter_add(1, index, values)[:, :num_out]


def _extreme(values: Tensor, slots: Tensor, num_out: int, reduce: str) -> Tensor:
    """amax or amin of values [B, N, C] by slot, 0 where a slot is empty."""
    # The start must equal no member: torch shares the gradient with it where it does.
    start = values.new_full((values.shape[0], num_out + 1, values.shape[2]), torch.nan)
    index = slots[..., None].expand_as(values)
    extreme = start.scatter_reduce(1, index, values, reduce, include_self=False)
    empty = torch.ones_like(extreme, dtype=torch.bool).scatter(1, index, False)
    return extreme.masked_fill(empty, 0)[:, :num_out]


def _divide(total: Tensor, divisor: Tensor) -> Tensor:
    """total / divisor, 0 where the divisor is 0."""
    zero = divisor == 0
    return (total / divisor.masked_fill(zero, 1)).masked_fill(zero, 0)


def _heaviest(x: Tensor, weight: Tensor, slots: Tensor, num_out: int) -> Tensor:
    """The member of each slot with the largest weight, the first of several."""
    tokens = x.shape[1]
    weight = weight.detach().masked_fill(weight.isnan(), -torch.inf)[..., None]
    padding = weight.new_zeros(x.shape[0], 1, 1)
    best = torch.cat([_extreme(weight, slots, num_out, "amax"), padding], 1)
    is_best = weight == best.gather(1, slots[..., None])
    position = torch.arange(tokens, device=x.device)[None, :, None]
    candidate = torch.where(is_best, position, tokens)
    first = candidate.new_full((x.shape[0], num_out + 1, 1), tokens)
    first = first.scatter_reduce(1, slots[..., None], candidate, "amin")[:, :num_out]
    rows = torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)
    return rows.gather(1, first.expand(-1, -1, x.shape[2]))


def _halves(weight: Tensor, slots: Tensor, num_out: int) -> Tensor:
    """Weights [B, N] that equal h <- (h + x) / 2 over the tokens of a slot, by position.

    h starts as the heaviest token, the keeper; x is each of the others.
    """
    position = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    keeper = _heaviest(position[..., None].to(torch.float64), weight, slots, num_out)[..., 0]
    keeper = _pick(keeper, slots)
    count = _pick(_sum(torch.ones_like(weight), slots, num_out), slots)
    rank = _rank(slots, num_out)
    step = torch.where(position > keeper, rank, rank + 1)  # of the others: 1, 2, ..
    step = torch.where(position == keeper, 1, step)  # the keeper and the first weigh the same
    return torch.exp2(step - count).to(weight.dtype)


def merge(
    x: Tensor,
    token_map: Tensor,
    num_out: int,
    size: Tensor | None = None,
    weight: Tensor | None = None,
    mode: str = "mean",
) -> tuple[Tensor, Tensor]:
    """See tokred.merge."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    slots = _slots(token_map, num_out)
    values = x.to(dtype)
    ones = torch.ones(x.shape[:2], dtype=dtype, device=x.device)
    size = ones if size is None else size.to(dtype)
    weight = ones if weight is None else weight.to(dtype)

    if mode in ("amax", "amin"):
        y = _extreme(values, slots, num_out, mode)
    elif mode == "prune":
        y = _heaviest(values, weight, slots, num_out)
    elif mode == "halving":
        y = _sum(_halves(weight, slots, num_out)[..., None] * values, slots, num_out)
    else:
        share = {"sum": weight, "plain_mean": weight}.get(mode, weight * size)[..., None]
        y = _sum(share * values, slots, num_out)
        if mode in ("mean", "plain_mean"):
            y = _divide(y, _sum(share, slots, num_out))
        elif mode == "maxnorm":
            norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            longest = _extreme(norm, slots, num_out, "amax")
            y = _divide(y * longest, torch.linalg.vector_norm(y, dim=-1, keepdim=True))
        elif mode != "sum":
            raise ValueError(f"mode {mode!r} is not one of tokred.merge's")
    return y.to(x.dtype), _sum(size, slots, num_out)


def unmerge(y: Tensor, token_map: Tensor) -> Tensor:
    """See tokred.unmerge."""
    slots = _slots(token_map, y.shape[1])
    rows = torch.cat([y, y.new_zeros(y.shape[0], 1, y.shape[2])], 1)
    return rows.gather(1, slots[..., None].expand(-1, -1, y.shape[2]))


def compose(second: Tensor, first: Tensor) -> Tensor:
    """See tokred.compose."""
    slots = _slots(first, second.shape[1])
    return torch.cat([second, second.new_full((second.shape[0], 1), -1)], 1).gather(1, slots)


def _segments(
    offsets: Tensor | None, ids: Tensor | None, tokens: int, num_segments: int | None
) -> tuple[Tensor, int]:
    """The segment of every token [..., N], -1 where it has none, and the number of segments."""
    if ids is not None:
        assert num_segments is not None
        return ids, num_segments
    assert offsets is not None
    position = torch.arange(tokens, device=offsets.device)[:, None]
    inside = (offsets[..., None, :-1] <= position) & (position < offsets[..., None, 1:])
    number = torch.arange(offsets.shape[-1] - 1, device=offsets.device)
    candidates = torch.nn.functional.pad(torch.where(inside, number, -1), (0, 1), value=-1)
    return candidates.amax(-1), len(number)


def _folded(t: Tensor, shape: tuple[int, ...], inner: int) -> Tensor:
    """t expanded to shape, with all but its `inner` last dimensions as one."""
    t = t.expand(shape)
    return t.reshape(t.shape[: t.dim() - inner].numel(), *t.shape[t.dim() - inner :])


def _share(value: Tensor, slots: Tensor, num_out: int) -> Tensor:
    """value [B, N] over its sum by slot, 0 where that is 0."""
    total = _sum(value, slots, num_out)
    return _divide(value, torch.nn.functional.pad(total, (0, 1)).gather(1, slots))


def segment_weights(
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    num_tokens: int | None = None,
    num_segments: int | None = None,
    mode: str = "softmax",
    weight: Tensor | None = None,
    x: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """See tokred.segment_weights."""
    shape = (
        x.shape[:-1] if x is not None
        else weight.shape if weight is not None
        else ids.shape if ids is not None
        else (*offsets.shape[:-1], num_tokens)  # type: ignore[union-attr]
    )  # fmt: skip
    rows, num_out = _segments(offsets, ids, shape[-1], num_segments)
    slots = _slots(_folded(rows, shape, 1), num_out)
    dtype = torch.float32
    for t in (x, weight):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    one = torch.ones(slots.shape, dtype=dtype, device=slots.device)
    position = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    before = _rank(slots, num_out)
    count = _pick(_sum(one, slots, num_out), slots)
    if mode == "sqrt":
        out = _divide(one, count.sqrt())
    elif mode == "last":
        out = (before == count - 1).to(dtype)
    elif mode == "softmax":
        assert weight is not None
        logit = _folded(weight, shape, 1).to(dtype)
        highest = logit.detach().masked_fill(logit.isnan(), -torch.inf)
        highest = _pick(_extreme(highest[..., None], slots, num_out, "amax")[..., 0], slots)
        out = _share((logit - highest.masked_fill(highest == -torch.inf, 0)).exp(), slots, num_out)
    elif mode == "gaussian":
        assert x is not None
        values = _folded(x, x.shape, 2).to(dtype)
        if weight is None:
            pivots = before == (count / 2).floor()
            pivot = _sum(torch.where(pivots, position, 0), slots, num_out)
        else:
            table = _folded(weight, shape, 1).to(dtype)
            pivot = _heaviest(position[..., None].to(torch.float64), table, slots, num_out)[..., 0]
        pivot = _pick(pivot, slots).long()
        center = values.gather(1, pivot[..., None].expand_as(values))
        distance = (values - center).square().sum(-1)
        mean = _divide(_pick(_sum(distance, slots, num_out), slots), count)
        variance = mean + 1e-8 if sigma is None else sigma * sigma
        out = _share((-0.5 * distance / variance).exp(), slots, num_out)
    else:
        raise ValueError(f"mode {mode!r} is not one of tokred.segment_weights'")
    return out.masked_fill(slots == num_out, 0).reshape(shape)


def _pick(by_slot: Tensor, slots: Tensor) -> Tensor:
    """by_slot [B, S] as its tokens see it [B, N], 0 for those of no slot."""
    return torch.nn.functional.pad(by_slot, (0, 1)).gather(1, slots)


def _rank(slots: Tensor, num_out: int) -> Tensor:
    """How many members of its slot stand before each token."""
    order = slots.argsort(dim=1, stable=True)
    ones = torch.ones_like(slots)
    count = torch.zeros(slots.shape[0], num_out + 1, dtype=slots.dtype, device=slots.device)
    start = count.scatter_add(1, slots, ones).cumsum(1)
    start = torch.nn.functional.pad(start, (1, -1))
    place = torch.empty_like(slots).scatter(1, order, ones.cumsum(1) - 1)
    return place - start.gather(1, slots)


def segment_pool(
    x: Tensor,
    offsets: Tensor | None = None,
    ids: Tensor | None = None,
    num_segments: int | None = None,
    mode: str = "mean",
    weight: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """See tokred.segment_pool."""
    rows, num_out = _segments(offsets, ids, x.shape[-2], num_segments)
    shape = x.shape[:-1]
    tokens, rows = _folded(x, x.shape, 2), _folded(rows, shape, 1)
    factor = None if weight is None else _folded(weight, shape, 1)
    how: dict[str, Any] = {"num_segments": num_out, "mode": mode}
    if mode in ("sqrt", "last"):
        share = segment_weights(ids=rows, **how)
        share = share.to(torch.promote_types(x.dtype, share.dtype))
        factor = share if factor is None else share * factor
    elif mode in ("softmax", "gaussian"):
        source = tokens if mode == "gaussian" else None
        factor = segment_weights(ids=rows, weight=factor, x=source, sigma=sigma, **how)
    reduce = {"mean": "plain_mean", "amax": "amax", "last": "prune"}.get(mode, "sum")
    y, _ = merge(tokens, rows.int(), num_out, None, factor, reduce)
    return y.reshape(*x.shape[:-2], num_out, x.shape[-1])


def adjacent_runs(
    x: Tensor,
    threshold: float,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    max_length: int = 0,
    num_sinks: int = 0,
    num_locals: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See tokred.adjacent_runs."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    later = (x if y is None else y).to(dtype)
    live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    cosine = torch.zeros(x.shape[:-1], dtype=dtype, device=x.device)
    unit = [torch.nn.functional.normalize(t, dim=-1, eps=1e-12) for t in (x.to(dtype), later)]
    both = live[..., 1:] & live[..., :-1]
    cosine[..., 1:] = (unit[0][..., :-1, :] * unit[1][..., 1:, :]).sum(-1).masked_fill(~both, 0)
    tokens = x.shape[-2]
    ids, start, length = (torch.full(x.shape[:-1], -1, dtype=torch.int32) for _ in range(3))
    count = torch.zeros(x.shape[:-2], dtype=torch.int32)
    folded = (x.shape[:-2].numel(), tokens)
    rows = [t.reshape(folded) for t in (ids, start, length)]
    for item, alive in enumerate(live.reshape(folded).cpu()):
        places = alive.nonzero()[:, 0].tolist()
        free = set(places[num_sinks : max(len(places) - num_locals, 0)])
        joins = (cosine.reshape(folded)[item] >= threshold).tolist()
        runs: list[list[int]] = []
        for t in places:
            joined = joins[t] and {t - 1, t} <= free and bool(runs) and runs[-1][-1] == t - 1
            if joined and not 0 < max_length <= len(runs[-1]):
                runs[-1].append(t)
            else:
                runs.append([t])
        count.view(-1)[item] = len(runs)
        for number, run in enumerate(runs):
            rows[0][item, run] = number
            rows[1][item, number], rows[2][item, number] = run[0], len(run)
    ids, start, length = (t.reshape(x.shape[:-1]).to(x.device) for t in rows)
    return ids, start, length, count.to(x.device), cosine


def forest_roots(parent: Tensor) -> tuple[Tensor, Tensor]:
    """See tokred.forest_roots; cycles get root -1."""
    tokens = parent.shape[1]
    is_root = (parent < 0) | (parent >= tokens)
    position = torch.arange(tokens, device=parent.device).expand_as(parent)
    above = torch.where(is_root, position, parent)
    root = above
    for _ in range(tokens.bit_length()):
        root = root.gather(1, root)
    children = torch.zeros_like(position).scatter_add(1, above, (~is_root).long())
    root = torch.where(is_root.gather(1, root), root, -1)
    return root.int(), children.int()


def forest_merge(
    x: Tensor, parent: Tensor, size: Tensor | None = None, reference_compat: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See tokred.forest_merge."""
    root, children = forest_roots(parent)
    if not reference_compat:
        return *merge(x, root, x.shape[1], size), root
    dtype = torch.promote_types(x.dtype, torch.float32)
    total, members = merge(x.to(dtype), root, x.shape[1], mode="sum")
    divisor = torch.where(members > 0, 1 + children, 0).to(dtype)
    return _divide(total, divisor[..., None]).to(x.dtype), divisor, root


def ema_scan(
    c: Tensor, p: Tensor, state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See tokred.ema_scan."""
    dtype = torch.promote_types(c.dtype, torch.float32)
    batch, tokens, channels = c.shape
    z = c.new_zeros(batch, channels, dtype=dtype) if state is None else state.to(dtype)
    rows = [z.new_zeros(batch, 0, channels)]
    for i in range(tokens):
        counts = torch.ones(batch, 1, dtype=torch.bool, device=c.device)
        if lengths is not None:
            counts = (i < lengths)[:, None]
        share = p[:, i, None].to(dtype)
        z = torch.where(counts, (1 - share) * z + share * c[:, i].to(dtype), z)
        rows.append(torch.where(counts, z, 0)[:, None])
    return torch.cat(rows, 1).to(c.dtype), z
