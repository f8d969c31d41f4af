"""What the merging methods share: token maps of links between tokens, and means by such maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

if TYPE_CHECKING:
    from tokred.patching import Reduced, ReductionCall


def identity(x: Tensor) -> Tensor:
    """i32 [B, N]: the map of x [B, N, ...] that leaves every token where it is."""
    batch, tokens = x.shape[:2]
    return torch.arange(tokens, dtype=torch.int32, device=x.device).repeat(batch, 1)


def map_of_links(links: Tensor) -> tuple[Tensor, Tensor]:
    """The token map in which every token follows its link; slots are in order of position.

    Args:
        links: i32 [B, N]: a token's own position where it stays, the position of a token that stays
            where it merges into that one, -1 where it is dropped.

    Returns:
        (token_map i32 [B, N], num_out i32 [B], the slots that each item uses).
    """
    stays = links == identity(links)
    slots = torch.where(stays, stays.cumsum(1) - 1, -1).to(torch.int32)
    return tokred.compose(slots, links.to(torch.int32)), stays.sum(1, dtype=torch.int32)


def link_best(links: Tensor, score: Tensor, partner: Tensor, sources: Tensor, count: int) -> Tensor:
    """links, with the `count` sources of highest score (lowest index on a tie) sent to partners.

    Args:
        links: i32 [B, N].
        score, partner: f32 and i32 [B, S], as `tokred.match` returns them; -inf and -1 for none.
        sources: i32 [S] or [B, S], the position of each row of score. A partner is the position of
            a token. Rows without a partner keep their link.

    Returns:
        i32 [B, N].
    """
    _, chosen = tokred.topk(score, count)
    rows = chosen.clamp(min=0).long()
    sources = sources.expand_as(score).long()
    target = partner.gather(1, rows)
    # The spare column takes what topk found no source for.
    place = torch.where((chosen >= 0) & (target >= 0), sources.gather(1, rows), links.shape[1])
    spare = torch.cat([links, links[:, :1]], 1)
    return spare.scatter(1, place, target.to(torch.int32))[:, :-1]


def drop_sources(token_map: Tensor, destinations: Tensor) -> Tensor:
    """The map that drops, in place of merging, whatever shares a slot with a destination.

    Args:
        token_map: i32 [B, N]. destinations: bool [B | 1, N].
    """
    slots = token_map.clamp(min=0).long()
    destinations = destinations.expand_as(slots)
    taken = torch.zeros_like(destinations).scatter_reduce(1, slots, destinations, "amax")
    return torch.where(taken.gather(1, slots) & ~destinations, -1, token_map)


def even_and_odd(tokens: int, num_prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ToMe's sources and destinations, i32: the even and the odd positions after the prefix."""
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    return position[num_prefix + num_prefix % 2 :: 2], position[num_prefix | 1 :: 2]


def every_second(tokens: int, num_prefix: int, device: torch.device) -> Tensor:
    """bool [1, N]: ToMe's destinations, the odd positions after the prefix."""
    position = torch.arange(tokens, device=device)[None]
    return (position % 2 == 1) & (position >= num_prefix)


def merged(
    call: ReductionCall,
    token_map: Tensor,
    num_out: int,
    mode: str = "mean",
    weight: Tensor | None = None,
) -> Reduced:
    """The tokens of a layer, merged in another way than by size-weighted means.

    Args:
        mode, weight: of `tokred.merge`; sizes are counted in any case, and weigh in "mean" alone.
    """
    x = call.tokens.contiguous()
    if weight is not None and x.dtype == torch.float64:
        weight = weight.double()
    size = call.size
    if mode == "maxnorm" and size is not None:
        # Its direction is that of the sum of weight * size * x: this leaves the plain sum.
        weight = 1 / size if weight is None else weight / size
    y, new_size = tokred.merge(x, token_map, num_out, size, weight, mode)
    return call.reduced(y, new_size, token_map)
