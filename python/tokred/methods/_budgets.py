"""How many tokens to keep: numbers and ratios, and a budget shared among groups."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ._lists import check_count

Rounding: TypeAlias = Literal["floor", "nearest", "ceil"]
Spare: TypeAlias = Literal["lost", "remainder", "weight"]


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
