"""Applying a map, in plain torch. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compose", "merge", "unmerge"]


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
    """The member of each slot with the greatest weight, the first of several."""
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
