"""HiRED: the thumbnail's class attention shares the budget over crops, that of each crop picks.

HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
Models (arXiv 2408.10945).

Crops share by what lies in their part of the thumbnail. The published code counts the bands of
consecutive tokens in their place: reference_compat=True. What rounding down leaves is lost in both.
Encoders without a class token, which the paper does not have, are ranked by the mean attention that
a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._budgets import allocate, keep_count
from ._crops import crops_of, encoder_attention, number_crops
from ._grids import cell_sums, check_grid
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, close_gaps, mask_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def crop_budgets(
    early: Tensor,
    k: int,
    grid: tuple[int, int],
    tiling: tuple[int, int],
    sizes: Tensor | None = None,
    alpha: float = 0.5,
    reference_compat: bool = False,
) -> Tensor:
    """i32 [B, 1 + crops]: how many tokens the thumbnail and each crop keep.

    The thumbnail gets int(k * alpha); the others share the rest by how many of the thumbnail's
    int(P * (1 - alpha)) most attended tokens lie in their part of it.

    Args:
        early: f32 [B, P], the thumbnail's class attention in an early layer.
        grid: (H, W) of a crop. tiling: (rows, columns) of the crops.
        sizes: integers [B, 1 + crops], how many tokens each of them has; P where None.
    """
    check_count("k", k)
    check_grid(early.shape[1], grid)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    places, crops = early.shape[1], tiling[0] * tiling[1]
    full = min(int(k * alpha), places)
    rest = min(k - full, crops * places)
    strong = mask_of(best(early, int(places * (1 - alpha))), places)
    if reference_compat:
        if places % crops:
            raise ValueError(f"tiling must divide the {places} tokens of the thumbnail")
        counts = strong.unflatten(1, (crops, -1)).sum(2)
    else:
        counts = cell_sums(strong, grid, tiling)
    shares = allocate(counts, rest, places if sizes is None else sizes[:, 1:])
    thumbnail = shares.new_full((len(shares), 1), full)
    if sizes is not None:
        thumbnail = torch.minimum(thumbnail, sizes[:, :1].int())
    return torch.cat([thumbnail, shares], 1)


def select_tokens(
    early: Tensor,
    deep: Tensor,
    k: int,
    grid: tuple[int, int],
    tiling: tuple[int, int],
    valid: Tensor | None = None,
    order: str = "position",
    alpha: float = 0.5,
    reference_compat: bool = False,
) -> Tensor:
    """The tokens of highest class attention of the thumbnail and of every crop, by crop_budgets.

    Args:
        early: f32 [B, P], the thumbnail's class attention in an early layer.
        deep: f32 [B, 1 + crops, P], that of the thumbnail and the crops in a late layer; sums and
            means over heads pick the same.
        k: of all together.
        grid: (H, W) of a crop. tiling: (rows, columns) of the crops.
        valid: bool [B, 1 + crops, P]; padding, which is False, is not kept.
        order: in a crop, "position", as published, or "score".

    Returns:
        i32 [B, k], numbers in [B, (1 + crops) * P], crop after crop, -1 behind the last.

    Raises:
        ValueError: another shape, grid, tiling or order, or alpha outside [0, 1].

    O(B N) time.
    """
    check_count("k", k)
    number, places = 1 + tiling[0] * tiling[1], grid[0] * grid[1]
    if early.dim() != 2 or deep.shape != (len(early), number, places):
        raise ValueError(
            f"deep must be [B, {number}, {places}] beside early [B, {places}], got "
            f"{list(deep.shape)} and {list(early.shape)}"
        )
    early, sizes = early.detach(), None
    if valid is not None:
        early, sizes = early.masked_fill(~valid[:, 0], -torch.inf), valid.sum(2)
    budgets = crop_budgets(early, k, grid, tiling, sizes, alpha, reference_compat)
    picks = best(deep, budgets, valid, order, places=min(k, places))
    return close_gaps(number_crops(picks, places), k)


@dataclass(frozen=True)
class HiredOptions(VisualOptions):
    """Options of tokred.patch(model, "hired", ...).

    keep: visual tokens kept per image. ratio: the share kept instead, rounded down.
    alpha: the thumbnail's part of them. early_layer, late_layer: of the encoder, whose attention
    shares the budget and picks; published are the first and the last but one. reference_compat: see
    the module. positions, newlines: as VisualOptions has them.
    """

    alpha: float = 0.5
    early_layer: int = 0
    late_layer: int = -2
    reference_compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio))

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The two that are read."""
        return [self.early_layer, self.late_layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens; of an image of one crop the most attended ones."""
        batch, tokens = call.tokens.shape[:2]
        k = self.count(tokens)
        if k == tokens:
            return None
        crops, late = crops_of(call), encoder_attention(call, self.late_layer)
        if call.layout is None or call.layout.tiling is None:
            return best(late, k)
        early = crops.values(encoder_attention(call, self.early_layer))
        shape = (batch, crops.number, -1)
        picks = select_tokens(
            early.view(shape)[:, 0],
            crops.values(late).view(shape),
            k,
            call.layout.crop_grid,
            call.layout.tiling,
            crops.valid(batch).view(shape),
            alpha=self.alpha,
            reference_compat=self.reference_compat,
        )
        return crops.of_flat(picks)


METHOD = Method(
    title=(
        "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution "
        "Vision-Language Models"
    ),
    arxiv="2408.10945",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="share the budget over crops by the thumbnail's class attention, pick by each crop's",
    options=HiredOptions,
)
