"""Bipartite matching, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "bipartite_soft_matching",
    "linear_assignment",
    "match",
    "sinkhorn",
    "threshold_matching",
]

NORM_EPS = 1e-12


def similarity(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """Scores of all pairs, [B, Na, Nb], in float32 or, for float64 inputs, float64."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    dot = a @ b.transpose(1, 2)
    if metric == "dot":
        return dot
    if metric == "l2":
        return 2 * dot - a.square().sum(-1)[:, :, None] - b.square().sum(-1)[:, None, :]
    norm_a, norm_b = (t.norm(dim=-1).clamp(min=NORM_EPS) for t in (a, b))
    cosine = dot / norm_a[:, :, None] / norm_b[:, None, :]
    return cosine if metric == "cosine" else (1 + cosine) / 2


def match(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    weight_a: Tensor | None = None,
    weight_b: Tensor | None = None,
    metric: str = "cosine",
    band: int = -1,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """See tokred.match. The score has the precision of the computation."""
    score = similarity(a, b, metric)
    rows, columns = (torch.arange(n, device=a.device) for n in score.shape[1:])
    if weight_a is not None:
        score = score * weight_a[:, :, None]
    if weight_b is not None:
        score = score * weight_b[:, None, :]
    skipped = score.isnan()
    if mask_a is not None:
        skipped = skipped | ~mask_a[:, :, None]
    if mask_b is not None:
        skipped = skipped | ~mask_b[:, None, :]
    if band >= 0:
        skipped = skipped | ((rows[:, None] - columns).abs() > band)
    score = score.masked_fill(skipped, -torch.inf)
    if k > 1:
        score = torch.nn.functional.pad(score, (0, k), value=-torch.inf)
        best, order = (t[..., :k] for t in score.sort(dim=-1, descending=True, stable=True))
        return best, order.masked_fill(best == -torch.inf, -1).int()

    hidden = score.new_full((*score.shape[:2], 1), -torch.inf)
    best = torch.cat([score, hidden], 2).amax(2)
    winners = torch.where(score == best[..., None], columns, len(columns))
    index = torch.cat([winners, torch.full_like(hidden, len(columns), dtype=torch.long)], 2).amin(2)
    return best, index.masked_fill(best == -torch.inf, -1).int()


def _sets(
    metric: Tensor, num_prefix: int, sources: Tensor | None, destinations: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """The two sides as i64 [B, n], and how many tokens may leave at most."""
    batch, tokens, _ = metric.shape
    if sources is not None and destinations is not None:
        sides = [torch.atleast_2d(side).long() for side in (sources, destinations)]
        limit = sides[0].shape[1]
    else:
        position = torch.arange(min(num_prefix, tokens), tokens, device=metric.device)
        sides = [position[position % 2 == parity][None] for parity in (0, 1)]
        limit = len(position) // 2
    return sides[0].expand(batch, -1), sides[1].expand(batch, -1), limit


def _match_sets(
    metric: Tensor, mask: Tensor | None, sources: Tensor, destinations: Tensor
) -> tuple[Tensor, Tensor]:
    rows, masks = [], []
    for side in (sources, destinations):
        valid = (side >= 0) & (side < metric.shape[1])
        position = torch.where(valid, side, 0)
        rows.append(metric.gather(1, position[..., None].expand(-1, -1, metric.shape[2])))
        masks.append(valid if mask is None else valid & mask.gather(1, position))
    return match(rows[0], rows[1], masks[0], masks[1])


@dataclass
class _Item:
    """One batch item: scores and indices by source row, masks by position."""

    score: list[float]
    index: list[int]
    sources: list[int]
    destinations: list[int]
    masked: list[bool]


def _rank(item: _Item, prefix: int) -> list[int]:
    """The rows of the sources that may leave, best first: matched, then masked, then unmatched."""
    fixed = {*range(prefix), *item.destinations}
    first_row: dict[int, int] = {}
    for row, token in enumerate(item.sources):
        if 0 <= token < len(item.masked) and token not in fixed:
            first_row.setdefault(token, row)

    def key(row: int) -> tuple[int, float]:
        if item.index[row] >= 0:
            return 0, -item.score[row]
        return (1, 0.0) if item.masked[item.sources[row]] else (2, 0.0)

    return sorted(first_row.values(), key=key)


def _plan_item(
    item: _Item, num_prefix: int, order: str, limit: int, threshold: float | None
) -> tuple[list[int], int]:
    """The map of one item, and its number of slots."""
    tokens = len(item.masked)
    prefix = min(num_prefix, tokens)
    ranked = _rank(item, prefix)
    dropped = set()
    if threshold is None:
        leaving = ranked[:limit]
    else:
        strong = [t for t in ranked if item.index[t] >= 0 and item.score[t] > threshold]
        leaving = strong[:limit]
        dropped = {t for t in range(tokens) if item.masked[t]}

    home = list(range(tokens))  # the token whose slot this token goes to, -1 for none
    for row in leaving:
        partner = item.index[row]
        home[item.sources[row]] = item.destinations[partner] if partner >= 0 else -1
    if order == "position":
        sequence = [t for t in home if t not in dropped]
    else:
        survivors = [t for t in ranked if t not in leaving]
        survivors = [item.sources[t] for t in (sorted(survivors) if num_prefix else survivors)]
        destinations = [t for t in item.destinations if prefix <= t < tokens]
        placed = {*range(prefix), *(item.sources[t] for t in ranked), *destinations}
        others = [t for t in range(tokens) if t not in placed]
        sequence = [*range(prefix), *others, *survivors, *destinations]
        sequence = [t for t in sequence if t not in dropped]
    slot: dict[int, int] = {-1: -1}
    for token in sequence:
        slot.setdefault(token, len(slot) - 1)
    num_out = len(slot) - 1
    capacity = num_out if threshold is not None else tokens - limit
    token_map = [slot.get(t, -1) for t in home]
    return [s if s < capacity else -1 for s in token_map], num_out


def _plan(
    metric: Tensor,
    r: int | None,
    threshold: float | None,
    num_prefix: int,
    mask: Tensor | None,
    order: str,
    sources: Tensor | None,
    destinations: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if metric.shape[1] == 0:
        empty = torch.zeros(metric.shape[0], 0, dtype=torch.int32, device=metric.device)
        return empty, empty.sum(1, dtype=torch.int32)
    source_rows, destination_rows, limit = _sets(metric, num_prefix, sources, destinations)
    score, index = _match_sets(metric, mask, source_rows, destination_rows)
    if mask is None:
        mask = torch.ones(metric.shape[:2], dtype=torch.bool)
    if threshold is not None:
        threshold = torch.tensor(threshold, dtype=score.dtype).item()
    limit = limit if r is None else min(r, limit)
    tables = (score, index, source_rows, destination_rows, ~mask)
    plans = [
        _plan_item(_Item(*columns), num_prefix, order, limit, threshold)
        for columns in zip(*(t.tolist() for t in tables), strict=True)
    ]
    token_map = torch.tensor([plan[0] for plan in plans], dtype=torch.int32, device=metric.device)
    counts = torch.tensor([plan[1] for plan in plans], dtype=torch.int32, device=metric.device)
    return token_map.reshape(metric.shape[:2]), counts


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> Tensor:
    """See tokred.bipartite_soft_matching; sources and destinations go together here."""
    return _plan(metric, r, None, num_prefix, mask, order, sources, destinations)[0]


def threshold_matching(
    metric: Tensor,
    threshold: float,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See tokred.threshold_matching; sources and destinations go together here."""
    return _plan(metric, None, threshold, num_prefix, mask, order, sources, destinations)


def _shortest_path(cost: Tensor, v: Tensor, owner: Tensor, row: int) -> tuple[int, Tensor] | None:
    """Dijkstra's algorithm from a row of [n, m] costs to a column without an owner.

    Lowers the prices v [m]; returns the column, and the row from which each one was reached.
    """
    distance, origin = cost[row] - v, torch.full_like(owner, row)
    done = torch.zeros_like(owner, dtype=torch.bool)
    while True:
        column = int(distance.masked_fill(done, torch.inf).argmin())
        smallest = distance[column].clone()
        if done[column] or smallest == torch.inf:
            return None
        if owner[column] < 0:
            v += torch.where(done, distance - smallest, 0)
            return column, origin
        done[column] = True
        row = int(owner[column])
        reached = smallest + (cost[row] - v) - (cost[row, column] - v[column])
        nearer = ~done & (reached < distance)
        distance, origin = torch.where(nearer, reached, distance), origin.masked_fill(nearer, row)


def _assign_item(cost: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The owner [m] of every column, and the duals u [n], v [m], of [n, m] costs with n <= m."""
    v, owner = cost.new_zeros(cost.shape[1]), torch.full((cost.shape[1],), -1)
    partner = [-1] * cost.shape[0]
    for start in range(cost.shape[0]):
        found = _shortest_path(cost, v, owner, start)
        if found is None:
            return None
        column, origin = found
        row = -1
        while row != start:
            row = int(origin[column])
            owner[column] = row
            partner[row], column = column, partner[row]
    u = cost[torch.arange(len(partner)), partner] - v[partner]
    return owner, u, v


def linear_assignment(
    cost: Tensor, maximize: bool = False, check: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See tokred.linear_assignment. An error names no row."""
    sign = -1 if maximize else 1
    costs = cost.double() * sign
    batch, rows, columns = cost.shape
    index = torch.full((batch, rows), -1, dtype=torch.int32)
    row_dual, column_dual = (torch.full((batch, n), torch.nan).double() for n in (rows, columns))
    for item in range(batch):
        wide = costs[item] if rows <= columns else costs[item].T
        valid = bool((wide > -torch.inf).all())
        found = _assign_item(wide) if valid else None
        if found is None:
            if check:
                raise RuntimeError(f"cost of item {item} is not valid, or forbids too many pairs")
            continue
        owner, u, v = found
        if rows <= columns:
            owned = owner >= 0
            index[item, owner[owned]] = owned.nonzero()[:, 0].int()
        else:
            index[item], u, v = owner.int(), v, u
        row_dual[item], column_dual[item] = sign * u, sign * v
    return index, row_dual, column_dual


def transport_cost(
    x: Tensor,
    anchors: Tensor,
    positions: tuple[Tensor | None, Tensor | None],
    times: tuple[Tensor | None, Tensor | None],
    offset: Tensor | None,
    position_weight: float,
    time_scale: float,
) -> Tensor:
    """The costs of all pairs, [B, M, N]. A row without length has no gradient."""
    x, anchors = (
        torch.where((t.detach().double().norm(dim=-1) > NORM_EPS)[..., None], t, t.detach())
        for t in (x, anchors)
    )
    cost = 1 - similarity(x, anchors, "cosine")
    if offset is not None:
        cost = cost - offset[:, None, None]
    if positions[0] is not None and positions[1] is not None:
        apart = positions[0][:, :, None] - positions[1][:, None]
        cost = cost + position_weight * apart.square().sum(-1).sqrt()
    if times[0] is not None and times[1] is not None:
        apart = times[0][:, :, None] - times[1][:, None]
        cost = cost * (1 - torch.exp(-apart.square() / (2 * time_scale**2)))
    return cost


def sinkhorn(
    x: Tensor,
    anchors: Tensor,
    position_x: Tensor | None = None,
    position_anchors: Tensor | None = None,
    time_x: Tensor | None = None,
    time_anchors: Tensor | None = None,
    mask_x: Tensor | None = None,
    mask_anchors: Tensor | None = None,
    offset: Tensor | None = None,
    position_weight: float = 0.5,
    time_scale: float = 1.5,
    eps: float = 0.1,
    iterations: int = 100,
    tolerance: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See tokred.sinkhorn."""
    positions, times = (position_x, position_anchors), (time_x, time_anchors)
    cost = transport_cost(x, anchors, positions, times, offset, position_weight, time_scale)
    batch, sources, targets = cost.shape
    masks = [
        torch.ones(batch, n, dtype=torch.bool, device=x.device) if mask is None else mask
        for n, mask in ((sources, mask_x), (targets, mask_anchors))
    ]
    pairs = masks[0][:, :, None] & masks[1][:, None]
    score = torch.where(pairs, -cost / eps, -torch.inf)
    log_a, log_b = (-mask.sum(1, keepdim=True).to(cost.dtype).log() for mask in masks)
    log_u = cost.new_full((batch, sources), -torch.inf)
    log_v = cost.new_zeros(batch, targets).masked_fill(~masks[1], -torch.inf)
    solvable = pairs.flatten(1).any(1)
    log_v = log_v.masked_fill(~solvable[:, None], -torch.inf)
    u, steps = masks[0].to(cost.dtype), torch.zeros(batch, dtype=torch.int32, device=x.device)
    running = solvable
    for _ in range(iterations):
        if not running.any():
            break
        # logsumexp of -inf alone has a NaN gradient: rows that are not updated sum zeros instead.
        right = [running[:, None] & mask for mask in masks]
        rows = torch.where(right[0][:, :, None], score + log_v[:, None], 0).logsumexp(2)
        log_u = torch.where(right[0], log_a - rows, log_u)
        columns = torch.where(right[1][:, None], score + log_u[:, :, None], 0).logsumexp(1)
        log_v = torch.where(right[1], log_b - columns, log_v)
        steps = steps + running
        moved = (log_u.exp() - u).abs().sum(1) / masks[0].sum(1).clamp(min=1)
        u, running = log_u.exp(), running & ~(moved < tolerance)
    plan = torch.where(pairs, (score + log_u[:, :, None] + log_v[:, None]).exp(), 0)
    tokens = torch.where(masks[0][..., None], x.to(cost.dtype), 0)
    total = plan.sum(2)
    most = torch.nn.functional.pad(plan, (0, 1)).amax(2)
    peak = torch.where(masks[0] & solvable[:, None], most / total, 0)
    return plan.transpose(1, 2) @ tokens, plan.sum(1), peak, log_u, log_v, steps
