"""Picks i32 [B, K], the indices of kept tokens, -1 for none: the best, their order, their masks."""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.selection import block_mask

from ._arguments import check_order
from ._lists import check_count


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


def rows_of(x: Tensor, picks: Tensor) -> Tensor:
    """[B, k, C]: the rows of x [B, N, C] that picks i32 [B, k] list, zeros for -1."""
    return tokred.gather_tokens([x], picks.contiguous(), [1])[0]
