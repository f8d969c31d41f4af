"""What the methods that select tokens share: budgets, picks in order, grids, thresholds, rounds."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.selection import block_mask

from ._lists import check_count

Order: TypeAlias = Literal["position", "score"]
Rounding: TypeAlias = Literal["floor", "nearest", "ceil"]
Spare: TypeAlias = Literal["lost", "remainder", "weight"]

# Arguments.


def check_order(order: str) -> None:
    """Raises unless order is "position" or "score"."""
    if order not in ("position", "score"):
        raise ValueError(f'order must be "position" or "score", got {order!r}')


def check_features(
    name: str, x: Tensor, batch: int | None = None, tokens: int | None = None
) -> None:
    """Raises unless x is [B, N, C], with the B and N asked for."""
    wanted = f"[{'B' if batch is None else batch}, {'N' if tokens is None else tokens}, C]"
    fits = isinstance(x, Tensor) and x.dim() == 3
    fits = fits and batch in (None, x.shape[0]) and tokens in (None, x.shape[1])
    if not fits:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be {wanted}, got {got}")


def check_scores(name: str, scores: Tensor, x: Tensor, valid: Tensor | None = None) -> None:
    """Refuses scores that are not [B, N] for the tokens x [B, N, C], and such a mask."""
    wanted = list(x.shape[:2])
    if list(scores.shape) != wanted:
        raise ValueError(f"{name} must be {wanted} for x {list(x.shape)}, got {list(scores.shape)}")
    if valid is not None and (list(valid.shape) != wanted or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {wanted}, got {valid.dtype} {list(valid.shape)}")


def head_mean(attention: Tensor, name: str = "attention") -> Tensor:
    """f32 [B, N]: attention [B, H, N] averaged over its heads; [B, N] as it is.

    Raises:
        ValueError: another number of dimensions.
    """
    if not isinstance(attention, Tensor) or attention.dim() not in (2, 3):
        got = list(attention.shape) if isinstance(attention, Tensor) else type(attention).__name__
        raise ValueError(f"{name} must be [B, H, N] or [B, N], got {got}")
    attention = attention.detach()
    return attention.float() if attention.dim() == 2 else attention.mean(1, dtype=torch.float32)


def features_of(x: Tensor) -> Tensor:
    """x for the ops that compare tokens: detached, rows in memory, float32 instead of float64."""
    x = x.detach()
    return (x.float() if x.dtype == torch.float64 else x).contiguous()


# Budgets.


def keep_count(
    tokens: int, keep: int | None = None, ratio: float | None = None, rounding: Rounding = "floor"
) -> int:
    """How many of `tokens` tokens stay: ratio of them where it is given, otherwise keep.

    Args:
        keep: at least 0; more than there are tokens means all of them.
        ratio: in [0, 1].
        rounding: of ratio * tokens; "nearest" takes the even one of two, as Python's round.

    Raises:
        ValueError: neither or a value outside.
    """
    if ratio is not None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {ratio}")
        if rounding not in ("floor", "nearest", "ceil"):
            raise ValueError(f'rounding must be "floor", "nearest" or "ceil", got {rounding!r}')
        share = round(ratio * tokens, 9)  # the last bit of 0.1 * 30 and the like must not decide
        if rounding == "nearest":
            return round(share)
        return math.floor(share) if rounding == "floor" else math.ceil(share)
    check_count("keep", keep)
    assert keep is not None
    return min(keep, tokens)


def check_budget(keep: int | None, ratio: float | None) -> None:
    """Refuses the options keep below 1 and ratio outside (0, 1]."""
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if keep is None and ratio is None:
        raise ValueError("keep must be at least 1 where ratio is None, got None")


def allocate(
    weight: Tensor,
    budget: int | Tensor,
    cap: int | Tensor | None = None,
    spare: Spare = "lost",
    redistribute: bool = False,
) -> Tensor:
    """Splits a budget over groups in proportion to their weights.

    Every group gets floor(budget * weight / sum of weights), at most its cap. What rounding leaves
    is lost, or goes, one each, to the groups of largest remainder or of largest weight (the lower
    index on a tie). In float64; without any weight all groups weigh the same.

    Args:
        weight: [..., G], negative and NaN count as 0.
        budget: an int, or integers [...].
        cap: the size of every group, an int or integers broadcast to [..., G].
        redistribute: what the caps cut off goes to the other groups, in proportion to their
            weights, so that min(budget, sum of caps) is given out with a spare that is not lost.

    Returns:
        i32 [..., G].

    Complexity: O(G log G).
    """
    if spare not in ("lost", "remainder", "weight"):
        raise ValueError(f'spare must be "lost", "remainder" or "weight", got {spare!r}')
    weight = weight.detach().double().nan_to_num(0.0).clamp_(min=0)
    groups = weight.shape[-1]
    weight = weight + (weight.sum(-1, keepdim=True) <= 0)
    total: int | Tensor = budget
    if isinstance(budget, Tensor):
        total = budget.to(weight).expand(weight.shape[:-1])[..., None]
    if spare == "lost" and not redistribute and not isinstance(cap, Tensor):
        share = (weight * total).div_(weight.sum(-1, keepdim=True)).floor_()
        return share.clamp_(max=math.inf if cap is None else cap).to(torch.int32)
    limit = torch.as_tensor(torch.inf if cap is None else cap, dtype=torch.float64)
    limit = limit.to(weight.device).expand_as(weight)
    if redistribute:
        full = _full(weight, total, limit)
        among = weight.masked_fill(full, 0.0).sum(-1, keepdim=True)
        rest = (total - torch.where(full, limit, 0.0).sum(-1, keepdim=True)).clamp(min=0)
        full = full | ((among == 0) & _full((~full).double(), rest, limit))
        share = torch.where(full, limit, _shares(weight, total, limit, full))
    else:
        share = weight * total / weight.sum(-1, keepdim=True)
    given = torch.minimum(share.floor(), limit)
    if spare != "lost":
        left = (total - share.floor().sum(-1, keepdim=True)).clamp(min=0)
        rank_by = share - share.floor() if spare == "remainder" else weight
        if redistribute:
            rank_by = rank_by.masked_fill(given >= limit, -1.0)
        order = rank_by.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(groups, device=order.device).expand_as(order)
        )
        given = torch.minimum(given + (rank < left), limit)
    return given.to(torch.int32)


def _full(weight: Tensor, total: int | Tensor, limit: Tensor) -> Tensor:
    """bool [..., G]: the groups whose share exceeds their limit, the others sharing what that
    leaves.

    In order of limit / weight each is full whose share is above its limit when all before it are
    full: none is behind the first that is not.
    """
    order = torch.where(weight > 0, limit / weight, torch.inf).argsort(dim=-1, stable=True)
    weight, cap = weight.gather(-1, order), limit.gather(-1, order)
    before = functional.pad(cap.cumsum(-1)[..., :-1], (1, 0))
    behind = weight.flip(-1).cumsum(-1).flip(-1)
    share = (total - before).clamp(min=0) * weight / behind.clamp(min=1e-300)
    above = (share > cap).long().cumprod(-1).bool()
    return torch.zeros_like(above).scatter(-1, order, above)


def _shares(weight: Tensor, total: int | Tensor, limit: Tensor, full: Tensor) -> Tensor:
    """What the groups that are not full get of what the full ones leave; 0 for these."""
    rest = total - torch.where(full, limit, 0.0).sum(-1, keepdim=True)
    open_weight = weight.masked_fill(full, 0.0)
    among = open_weight.sum(-1, keepdim=True)
    # Groups without weight share alike once all others are full.
    open_weight = torch.where(among > 0, open_weight, (~full).double())
    return rest.clamp(min=0) * open_weight / open_weight.sum(-1, keepdim=True).clamp(min=1e-300)


# Picks.


def best(
    scores: Tensor,
    k: int | Tensor,
    valid: Tensor | None = None,
    order: str = "position",
    must_keep: Tensor | None = None,
    places: int | None = None,
) -> Tensor:
    """The k best tokens of every row: the lower index on a tie; NaN and -inf are never kept.

    Args:
        scores: [..., N].
        k: an int, or integers [...], the budget of every row; more than N means all.
        valid: bool [..., N]; False (padding) is never kept.
        order: "position", ascending, or "score", best first.
        must_keep: bool [..., N]; these come first, and count against k.
        places: of the result, beside a k of each row; N where None.

    Returns:
        i32 [..., k], or [..., places] for a k of each row; -1 behind the last.

    Raises:
        ValueError: another order, or k that is no int or integers.
    """
    check_order(order)
    check_count("k", k, per_row=True)
    scores = scores.detach()
    scores = scores.float() if scores.dtype == torch.float64 else scores
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
        must_keep = None if must_keep is None else must_keep & valid
    if isinstance(k, Tensor):
        row_k = k.to(torch.int32).expand(scores.shape[:-1]).contiguous()
        places = scores.shape[-1] if places is None else places
    else:
        row_k, places = None, k
    must_keep = None if must_keep is None else must_keep.expand_as(scores).contiguous()
    _, indices = tokred.topk(
        scores.contiguous(), places, order=order, row_k=row_k, must_keep=must_keep
    )
    return indices


def in_order(picks: Tensor, order: str) -> Tensor:
    """Picks i32 [..., k] as they are for "score"; for "position" ascending, -1 behind the last."""
    check_order(order)
    if order == "score":
        return picks
    last = torch.iinfo(torch.int32).max
    ascending = torch.where(picks < 0, last, picks).sort(-1).values
    return torch.where(ascending == last, -1, ascending).to(torch.int32)


def close_gaps(picks: Tensor, k: int | None = None) -> Tensor:
    """i32 [..., k], as wide as the picks i32 [..., M] where None: their first k, then the -1."""
    return tokred.compact(picks, capacity=k)[0]


def mask_of(picks: Tensor, tokens: int) -> Tensor:
    """bool [..., N]: which of `tokens` tokens the picks i32 [..., k] list; -1 lists none."""
    return block_mask(picks, tokens)


def positions_of(keep: Tensor, k: int | None = None) -> Tensor:
    """i32 [..., k], N places where None: where bool [..., N] is True, ascending, then -1."""
    return tokred.compact(keep, capacity=k)[0]


def spaced_picks(rank: Tensor, count: Tensor, picks: Tensor) -> Tensor:
    """Whether the member of that rank is one of evenly spaced picks of its group.

    Pick i of `picks` is member floor(i (count - 1) / (picks - 1)), the first one where picks is 1.

    Args:
        rank, count, picks: integers that broadcast; ranks are from 0 to count - 1.

    Returns:
        bool, False where picks is below 1.
    """
    rank, count, picks = rank.long(), count.long(), picks.long()
    steps, last = (picks - 1).clamp(min=1), (count - 1).clamp(min=1)
    # The first pick at this rank or behind it.
    pick = (rank * steps + last - 1).div(last, rounding_mode="floor")
    hit = (pick * last).div(steps, rounding_mode="floor") == rank
    several = hit & (pick < picks)
    return (picks >= 1) & torch.where((picks == 1) | (count <= 1), rank == 0, several)


def ranks_in_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """The rank of every token among the tokens of its group, by position, and the group's size.

    Args:
        group: integers [B, N], from 0 to N - 1; those below 0 are one group of their own.

    Returns:
        (rank i64 [B, N], size i64 [B, N]).
    """
    batch, tokens = group.shape
    slot = (group.long() + 1).clamp(min=0)
    count = torch.zeros(batch, tokens + 1, dtype=torch.int64, device=group.device)
    count = count.scatter_add(1, slot, torch.ones_like(slot))
    first = count.cumsum(1) - count
    order = slot.argsort(dim=1, stable=True)
    place = torch.arange(tokens, device=group.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    return rank - first.gather(1, slot), count.gather(1, slot)


# Grids.


def check_grid(tokens: int, grid: tuple[int, int]) -> None:
    """Refuses a grid (H, W) that has another number of tokens."""
    if min(grid) < 1 or grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must have {tokens} tokens, got {grid[0]} x {grid[1]}")


def cell_sums(values: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """f32 [..., rows * columns]: the sums over the cells when cells (rows, columns) divide a grid.

    Cells are H // rows tokens high and W // columns wide, the last ones take what is left.

    Args:
        values: [..., H * W]. grid: (H, W).

    Raises:
        ValueError: more cells than tokens along an axis, or a grid that does not fit.
    """
    check_grid(values.shape[-1], grid)
    if min(cells) < 1 or cells[0] > grid[0] or cells[1] > grid[1]:
        raise ValueError(
            f"cells must be from 1 x 1 to the grid's {grid[0]} x {grid[1]}, got "
            f"{cells[0]} x {cells[1]}"
        )
    if grid[0] % cells[0] == grid[1] % cells[1] == 0:
        shape = cells[0], grid[0] // cells[0], cells[1], grid[1] // cells[1]
        # In float64, so that no order of addition shows.
        return values.unflatten(-1, shape).sum((-3, -1), dtype=torch.float64).flatten(-2).float()
    rows, columns = (
        (torch.arange(size, device=values.device) // (size // parts)).clamp(max=parts - 1)
        for size, parts in zip(grid, cells, strict=True)
    )
    sums = values.new_zeros(*values.shape[:-1], cells[0] * cells[1], dtype=torch.float32)
    return sums.index_add_(-1, (rows[:, None] * cells[1] + columns).flatten(), values.float())


def dilate(selected: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [..., H * W]: selected and their neighbours above, below, left and right in the grid."""
    check_grid(selected.shape[-1], grid)
    image = selected.unflatten(-1, grid)
    grown = image.clone(memory_format=torch.contiguous_format)
    for dim in (-2, -1):
        if (rest := image.shape[dim] - 1) > 0:
            grown.narrow(dim, 1, rest).logical_or_(image.narrow(dim, 0, rest))
            grown.narrow(dim, 0, rest).logical_or_(image.narrow(dim, 1, rest))
    return grown.flatten(-2)


def resize(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """f32 [..., H' * W']: a map [..., H * W] resized bilinearly, corners not aligned."""
    check_grid(values.shape[-1], grid)
    rows = values.float().reshape(-1, 1, *grid)
    out = functional.interpolate(rows, size, mode="bilinear", align_corners=False)
    return out.reshape(*values.shape[:-1], size[0] * size[1])


def content_mask(
    image: tuple[int, int], grid: tuple[int, int], threshold: float = 0.5, device: str = "cpu"
) -> Tensor:
    """bool [H * W]: the patches of a letter-boxed image that show some of it.

    The image (width, height) is scaled to fit the square or rectangle of the grid (H, W), centred,
    and padded; a patch counts where at most `threshold` of its area is padding.
    """
    width, height = image
    if min(width, height) < 1:
        raise ValueError(f"image must be (width, height) of at least 1, got {image}")
    rows, columns = grid
    scale = min(columns / width, rows / height)

    def covered(size: int, patches: int) -> Tensor:
        """How much of every patch along an axis lies in the image."""
        margin = (patches - size * scale) / 2
        place = torch.arange(patches, dtype=torch.float64, device=device)
        return ((place + 1).clamp(max=patches - margin) - place.clamp(min=margin)).clamp(min=0)

    area = covered(height, rows)[:, None] * covered(width, columns)
    return (1 - area <= threshold + 1e-9).flatten()


# Thresholds, one a row.


def unit_range(values: Tensor, valid: Tensor | None = None, eps: float = 1e-12) -> Tensor:
    """f32 [..., N]: values - smallest, divided by (largest - smallest + eps), over the valid ones.

    NaN stays, and bounds nothing. Equal values give 0.
    """
    values = values.float()
    if values.shape[-1] == 0:
        return values
    bounds = ~values.isnan() if valid is None else valid & ~values.isnan()
    low, high = (values.masked_fill(~bounds, bound) for bound in (torch.inf, -torch.inf))
    smallest, largest = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    return (values - smallest) / (largest - smallest + eps)


def percentile(values: Tensor, q: float, valid: Tensor | None = None) -> Tensor:
    """f32 [..., 1]: the q-th percentile of every row, q in [0, 100], linear between two values.

    Rows without a valid value give NaN.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be in [0, 100], got {q}")
    values = values.float()
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    if valid is None:
        count = torch.full_like(values[..., :1], values.shape[-1], dtype=torch.float64)
    else:
        values = values.masked_fill(~valid, torch.inf)
        count = valid.expand_as(values).sum(-1, keepdim=True).double()
    ascending = values.sort(-1).values
    place = (count - 1).clamp(min=0) * (q / 100)
    low = place.floor()
    below = ascending.gather(-1, low.long())
    above = ascending.gather(-1, torch.minimum(low + 1, (count - 1).clamp(min=0)).long())
    found = torch.where(above > below, below + (above - below) * (place - low).float(), below)
    return torch.where(count > 0, found, torch.nan)


def elbow(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """f32 [..., 1]: the value at the elbow of every row's descending values.

    That is the point (rank, value) farthest from the chord between the first and the last point,
    the first of several. Rows without a valid value give inf.
    """
    values = values.float()
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.inf)
    if valid is None:
        last = torch.full_like(values[..., :1], values.shape[-1] - 1, dtype=torch.int64)
    else:
        values = values.masked_fill(~valid, -torch.inf)
        last = valid.expand_as(values).sum(-1, keepdim=True) - 1
    descending = values.sort(-1, descending=True).values
    rank = torch.arange(values.shape[-1], device=values.device)
    end = descending.gather(-1, last.clamp(min=0))
    rise = (end - descending[..., :1]).double()
    # Up to the chord's length, which is the same for all points of a row.
    away = (rise * rank - last * (descending - descending[..., :1]).double()).abs()
    place = away.masked_fill(rank > last, -1.0).argmax(-1, keepdim=True)
    return torch.where(last >= 0, descending.gather(-1, place), torch.inf)


def soft_topk(scores: Tensor, k: int | Tensor, iterations: int = 64) -> Tensor:
    """f32 [..., N]: sigmoid(scores + t) with the t of every row at which they sum to k.

    VisionSelector's relaxation of the k best, by bisection. k is an int from 0 to N, or such [...].
    """
    scores = scores.double()
    total = torch.as_tensor(k, dtype=torch.float64, device=scores.device)
    total = total.expand(scores.shape[:-1])[..., None]
    low = -scores.amax(-1, keepdim=True) - 10 - math.log(max(scores.shape[-1], 1))
    high = -scores.amin(-1, keepdim=True) + 10 + math.log(max(scores.shape[-1], 1))
    for _ in range(iterations):
        middle = (low + high) / 2
        below = torch.sigmoid(scores + middle).sum(-1, keepdim=True) < total
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.sigmoid(scores + (low + high) / 2).float()


# Rounds of pruning.


def prune_in_rounds(
    x: Tensor, rest: Tensor, keep: int, step: int = 8, by_similarity: bool = True
) -> Tensor:
    """VisPruner's duplicates: every round drops those of every second token most like the others.

    Of a list of R tokens those at even places are compared with those at odd places, by cosine;
    the min(step, R - keep, even places) with the most similar partner are dropped (the earlier
    place on a tie), until `keep` are left.

    Args:
        x: [B, N, C].
        rest: i32 [B, R], the list of every row, -1 behind the last.
        by_similarity: the list of the next round has the even ones that stay, by descending
            similarity, then the odd ones; False leaves the list in its order.

    Returns:
        i32 [B, min(keep, R)], -1 behind the last.

    Complexity: (R - keep) / step rounds, of R^2 C / 2 flops each on CUDA and under torch.compile.
        On the CPU all tokens are compared once, and again whenever one has none of its 32 most
        similar ones left to be compared with: about 3 R^2 C flops. No R x R matrix.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")

    def dropped(length: int) -> int:
        return min(step, length - keep, (length + 1) // 2)

    listed = None if x.is_cuda or torch.compiler.is_compiling() else _Nearest(x)
    while (drop := dropped(rest.shape[1])) > 0:
        there = rest >= 0
        length = there.sum(1)
        # Rows that began shorter have fewer rounds.
        row_drop = torch.minimum((length - keep).clamp(0, step), (length + 1) // 2)[:, None]
        score = _to_odd_places(x, rest) if listed is None else listed.to_odd_places(rest)
        descending = score.argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(score.shape[1], device=x.device)
        survives = there[:, ::2].gather(1, descending) & (rank >= row_drop)
        if by_similarity:
            stays = torch.cat([survives, there[:, 1::2]], 1)
            order = torch.cat([rest[:, ::2].gather(1, descending), rest[:, 1::2]], 1)
        else:
            stays, order = there.scatter(1, descending * 2, survives), rest
        places = positions_of(stays, rest.shape[1] - drop)
        left = torch.where(places >= 0, order.gather(1, places.clamp(min=0).long()), -1)
        rest = torch.where(row_drop > 0, left, rest[:, : left.shape[1]]).to(torch.int32)
    return rest.contiguous()


def _to_odd_places(x: Tensor, rest: Tensor) -> Tensor:
    """f32 [B, E]: the largest cosine of each token at an even place of the list to one between."""
    sides = [rest[:, start::2].contiguous() for start in (0, 1)]
    return tokred.match(*(rows_of(x, side) for side in sides), *(side >= 0 for side in sides))[0]


class _Nearest:
    """The most similar tokens of every token of x [B, N, C], among those of a list.

    Lists only get shorter: a list of nearest tokens serves until one has none of them to be
    compared with.
    """

    def __init__(self, x: Tensor, number: int = 32) -> None:
        self.x, self.number = x, number
        self.score: Tensor | None = None  # f32 [B, N, number], descending
        self.index: Tensor | None = None  # i64 [B, N, number]: tokens, N behind the last

    def to_odd_places(self, rest: Tensor) -> Tensor:
        """_to_odd_places of the list."""
        for fresh in (False, True):
            if fresh or self.score is None:
                self._list(rest)
            score, known = self._look_up(rest)
            if known:
                return score
        return _to_odd_places(self.x, rest)

    def _list(self, rest: Tensor) -> None:
        batch, tokens, _ = self.x.shape
        rows, there = rows_of(self.x, rest), rest >= 0
        score, place = tokred.match(rows, rows, there, there, k=self.number)
        place = place.long()
        listed = rest.long()[:, :, None].expand(-1, -1, self.number)
        near = listed.gather(1, place.clamp(min=0))
        near = torch.where(place >= 0, near, tokens)
        at = torch.where(there, rest.long(), tokens)[:, :, None].expand(-1, -1, self.number)
        spare = (batch, tokens + 1, self.number)
        self.score = score.new_full(spare, -torch.inf).scatter_(1, at, score)
        self.index = near.new_full(spare, tokens).scatter_(1, at, near)

    def _look_up(self, rest: Tensor) -> tuple[Tensor, bool]:
        assert self.score is not None and self.index is not None
        batch, tokens, _ = self.x.shape
        place = torch.where(rest >= 0, rest.long(), tokens)
        even, odd = place[:, ::2], place[:, 1::2]
        is_odd = torch.zeros(batch, tokens + 1, dtype=torch.bool).scatter_(1, odd, True)
        is_odd[:, tokens] = False
        row = torch.arange(batch)[:, None]
        near = self.index[row, even]
        usable = is_odd.gather(1, near.flatten(1)).view_as(near)
        score = torch.where(usable, self.score[row, even], -torch.inf).amax(-1)
        # A list that is not full has all candidates.
        return score, not bool(((score == -torch.inf) & (near[..., -1] < tokens)).any())


def rows_of(x: Tensor, picks: Tensor) -> Tensor:
    """[B, k, C]: the rows of x [B, N, C] that picks i32 [B, k] list, zeros for -1."""
    return tokred.gather_tokens([x], picks.contiguous(), [1])[0]
