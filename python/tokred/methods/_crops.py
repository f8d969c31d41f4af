"""The visual tokens of an image by the crops that its encoder saw, as rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokred.selection import scatter_back

from ._arguments import head_mean
from ._picks import close_gaps, in_order

if TYPE_CHECKING:
    from tokred.patching import VisualCall


@dataclass(frozen=True)
class Crops:
    """Which token is at which place of which crop.

    token: i32 [M, P], -1 where a place has none, as behind the borders of a padded image.
    """

    token: Tensor

    @property
    def number(self) -> int:
        return self.token.shape[0]

    def values(self, x: Tensor) -> Tensor:
        """[B, N, ...] of the tokens -> [B * M, P, ...], those of another token where there is none.

        `valid` tells which these are.
        """
        return x[:, self.token.clamp(min=0).long()].flatten(0, 1)

    def spread(self, values: Tensor, tokens: int) -> Tensor:
        """[B * M, P] of the places -> [B, N] of the tokens; the inverse of `values`."""
        rows = values.reshape(-1, self.token.numel(), 1)
        nothing = rows.new_zeros(len(rows), tokens, 1)
        return scatter_back(nothing, rows, self.token.flatten().expand(rows.shape[:2]))[..., 0]

    def valid(self, batch: int) -> Tensor:
        """bool [B * M, P]."""
        return (self.token >= 0).repeat(batch, 1)

    def tokens(self, picks: Tensor, order: str = "position") -> Tensor:
        """Places i32 [B * M, k] of every crop -> tokens i32 [B, M * k], then -1.

        Ascending, or for order "score" as they are, crop after crop.
        """
        first = torch.arange(self.number, device=picks.device)[:, None] * self.token.shape[1]
        picks = picks.unflatten(0, (-1, self.number))
        return self.of_flat(torch.where(picks >= 0, picks + first, -1).flatten(1), order)

    def of_flat(self, picks: Tensor, order: str = "position") -> Tensor:
        """Places in all crops i32 [B, k], crop * P + place -> tokens i32 [B, k], then -1.

        Ascending, or for order "score" as they are.
        """
        found = torch.where(picks >= 0, self.token.flatten()[picks.clamp(min=0).long()], -1)
        return close_gaps(found) if order == "score" else in_order(found, order)


def number_crops(picks: Tensor, places: int, first: int = 0) -> Tensor:
    """i32 [B, M * k]: places picked in crops i32 [B, M, k] -> crop * places + place; -1 stays.

    Args:
        places: of a crop. first: the number of the first crop.
    """
    last = first + picks.shape[1]
    start = torch.arange(
        first * places, last * places, places, dtype=torch.int32, device=picks.device
    )
    return (picks + start[:, None]).masked_fill_(picks < 0, -1).flatten(1)


def crops_of(call: VisualCall) -> Crops:
    """The crops of a call; one of all tokens where its layout is not known."""
    tokens, device = call.tokens.shape[1], call.tokens.device
    position = torch.arange(tokens, dtype=torch.int32, device=device)
    if call.layout is None or call.layout.num_crops == 1:
        return Crops(position[None])
    layout = call.layout
    places = layout.crop_grid[0] * layout.crop_grid[1]
    slot = layout.crop.long() * places + layout.place.long()
    token = torch.full((layout.num_crops * places,), -1, dtype=torch.int32, device=device)
    return Crops(token.scatter(0, slot, position).view(layout.num_crops, places))


def select_in_crops(
    call: VisualCall,
    count: int,
    select: Callable[..., Tensor],
    *x: Tensor,
    order: str = "position",
) -> Tensor | None:
    """The tokens that a rule keeps when every crop gets an equal part of the count.

    Args:
        count: tokens that an image keeps: all of them, None; otherwise what does not divide is
            lost, but a crop keeps one.
        select: called as select(*x, k, valid=...), x [B, N, ...] by crops as [B * M, P, ...], and
            returns places i32 [B * M, k].
        order: "position": ascending; "score": as the rule has them, crop after crop.
    """
    if count >= call.tokens.shape[1]:
        return None
    crops = crops_of(call)
    k = max(1, count // crops.number)
    picks = select(*map(crops.values, x), k, valid=crops.valid(call.tokens.shape[0]))
    return crops.tokens(picks, order)


def encoder_attention(call: VisualCall, layer: int) -> Tensor:
    """f32 [B, N]: what the class token gives each token in a layer of the encoder, mean over heads.

    Where the encoder has no class token, the mean of what each receives in its crop.
    """
    if call.has_class_token:
        return head_mean(call.class_attention(layer))
    return head_mean(call.received_attention(layer))
