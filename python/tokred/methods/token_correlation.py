"""Token correlation: every crop keeps as much as it has that is not redundant, by class attention.

Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding (arXiv
2407.14439).

An approximate version, after reviews of the paper: from which cosine on two patches correlate, how
many such patches make one redundant, and how the kept tokens are divided between a late layer
(global) and an early one (local) are ours. Tokens of the highest attention are kept where the paper
samples. Encoders without a class token are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, check_order, features_of, head_mean
from ._budgets import allocate
from ._crops import crops_of, encoder_attention
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, close_gaps, in_order, mask_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def information_density(
    keys: Tensor, threshold: float = 0.8, neighbours: int = 4, valid: Tensor | None = None
) -> Tensor:
    """f32 [B]: the share of the patches that are not redundant, 0 without any patch.

    A patch is redundant where its cosine to at least `neighbours` others is above the threshold.

    Args:
        keys: [B, N, C], of the patches of one crop a row, all heads side by side.
        valid: bool [B, N]; padding, which is False, counts nowhere.

    O(B N^2 C) time, memory linear in N.
    """
    check_features("keys", keys)
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    stats = tokred.similarity_stats(
        features_of(keys), threshold=threshold, exclude_self=True, mask_a=valid
    )
    unique = stats.count < neighbours
    there = torch.ones_like(unique) if valid is None else valid
    return (unique & there).sum(1) / there.sum(1).clamp(min=1)


def select_tokens(
    keys: Tensor,
    late: Tensor,
    early: Tensor,
    k: int,
    crops: int = 1,
    valid: Tensor | None = None,
    order: str = "position",
    threshold: float = 0.8,
    neighbours: int = 4,
    global_share: float = 0.5,
) -> Tensor:
    """The crops of an image share k by their information_density, and keep the most attended.

    Of its part each crop takes global_share, rounded down, by the late layer's attention, and the
    rest of it by the early one's. What rounding leaves goes to the crops of largest remainder; what
    a crop cannot use goes to others.

    Args:
        keys: [B * crops, P, C], of the patches of a crop a row, the crops of an image in a row.
        late, early: [B * crops, H, P] or [B * crops, P], class attention in two layers.
        k: tokens kept of an image.
        valid: bool [B * crops, P]; padding, which is False, is not kept.
        order: in a crop, "position", or "score": those of the late layer first.
        threshold, neighbours: see information_density.

    Returns:
        i32 [B, k], numbers in [B, crops * P], crop after crop, -1 behind the last.

    Raises:
        ValueError: another shape or order, or a share outside [0, 1].
    """
    check_count("k", k)
    check_order(order)
    if not 0 <= global_share <= 1:
        raise ValueError(f"global_share must be in [0, 1], got {global_share}")
    late, early = head_mean(late, "late"), head_mean(early, "early")
    if crops < 1 or len(keys) % crops:
        raise ValueError(f"crops must divide the {len(keys)} rows of keys, got {crops}")
    rows, places = late.shape
    there = torch.ones_like(late, dtype=torch.bool) if valid is None else valid
    density = information_density(keys, threshold, neighbours, valid).view(-1, crops)
    size = there.sum(1).view(-1, crops)
    budget = allocate(density, k, size, "remainder", redistribute=True).view(rows)
    seen = (budget.double() * global_share).floor().int()
    width = min(k, places)
    first = best(late, seen, there, order, places=width)
    free = there & ~mask_of(first, places)
    others = best(early, budget - seen, free, order, places=width)
    picks = torch.cat([first, others], 1)
    if order == "position":
        picks = in_order(picks, order)
    start = torch.arange(crops, dtype=torch.int32, device=picks.device)[:, None] * places
    picks = picks.view(rows // crops, crops, 2 * width)
    listed = torch.where(picks >= 0, picks + start, -1).flatten(1)
    listed = torch.nn.functional.pad(listed, (0, max(0, k - listed.shape[1])), value=-1)
    return close_gaps(listed, k)


@dataclass(frozen=True)
class TokenCorrelationOptions(VisualOptions):
    """Options of tokred.patch(model, "token_correlation", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    threshold, neighbours: a patch is redundant whose cosine to so many others is above it.
    global_share: the part of the kept tokens that late_layer chooses; early_layer chooses the rest.
    late_layer, early_layer: of the encoder; the keys compared are those of the late one.
    positions, newlines: as VisualOptions has them.
    """

    threshold: float = 0.8
    neighbours: int = 4
    global_share: float = 0.5
    late_layer: int = -2
    early_layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {self.neighbours}")
        if not 0 <= self.global_share <= 1:
            raise ValueError(f"global_share must be in [0, 1], got {self.global_share}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The two that are read."""
        return [self.late_layer, self.early_layer]

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of all crops, the thumbnail among them."""
        crops = crops_of(call)
        keys = crops.values(call.keys(self.late_layer).transpose(1, 2).flatten(2))
        late, early = (
            crops.values(encoder_attention(call, layer))
            for layer in (self.late_layer, self.early_layer)
        )
        batch, tokens = call.tokens.shape[:2]
        picks = select_tokens(
            keys,
            late,
            early,
            self.count(tokens),
            crops.number,
            crops.valid(batch),
            threshold=self.threshold,
            neighbours=self.neighbours,
            global_share=self.global_share,
        )
        return crops.of_flat(picks)


METHOD = Method(
    title=(
        "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding"
    ),
    arxiv="2407.14439",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="approximate",
    summary="crops keep as much as they have that is not redundant, by class attention",
    options=TokenCorrelationOptions,
)
