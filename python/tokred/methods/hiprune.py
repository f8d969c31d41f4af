"""HiPrune: anchors of a middle layer with their neighbours, then what a deep layer attends to.

HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models
(arXiv 2508.00553).

Neighbours are those in the grid. The published code for LLaVA takes the tokens before and behind in
the row of all, so that those of the next row of the grid count, and clamps what lies outside:
reference_compat=True. Of an image of several crops every crop keeps as many. The same rule drops
tokens behind the deep layer of a vision encoder by itself, whose patches must be a square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._arguments import head_mean
from ._budgets import keep_count
from ._crops import select_in_crops
from ._dropping import behind_prefix, finite
from ._grids import check_grid, dilate
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, mask_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import ReductionCall, VisualCall


def select_tokens(
    middle: Tensor,
    deep: Tensor,
    k: int | Tensor,
    grid: tuple[int, int],
    valid: Tensor | None = None,
    order: str = "position",
    alpha: float = 0.1,
    reference_compat: bool = False,
) -> Tensor:
    """round(k * alpha / 5) anchors, their four neighbours, and the best others of the deep layer.

    Args:
        middle, deep: [B, H, N] or [B, N], the mean attention that each token receives in a layer
            from all, the class token included; tokens are a grid, row by row.
        k: an int, or i32 [B].
        grid: (H, W).
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score": anchors and neighbours, then the others.
        alpha: the part of k that anchors and neighbours make up.
        reference_compat: see above.

    Returns:
        i32 [B, k] ([B, N] for a k of each row), -1 behind the last.

    Raises:
        ValueError: another shape, grid or order, or alpha outside [0, 1].

    O(B H N) time.
    """
    check_count("k", k, per_row=True)
    middle, deep = head_mean(middle, "middle"), head_mean(deep, "deep")
    tokens = deep.shape[1]
    check_grid(tokens, grid)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    anchors = (
        (k.double() * alpha / 5).round().int() if isinstance(k, Tensor) else round(k * alpha / 5)
    )
    first = best(middle, anchors, valid, "score")
    if reference_compat:
        steps = torch.tensor([0, -1, 1, -grid[1], grid[1]], dtype=torch.int32, device=deep.device)
        near = (first[..., None] + steps).clamp(0, tokens - 1)
        near = torch.where(first[..., None] >= 0, near, -1).flatten(1)
        chosen = mask_of(near, tokens)
    else:
        chosen = dilate(mask_of(first, tokens), grid)
    return best(deep, k, valid, order, must_keep=chosen)


@dataclass(frozen=True)
class HipruneOptions(VisualOptions):
    """Options of tokred.patch(model, "hiprune", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    alpha: the part of them that anchors and their neighbours make up. middle_layer, deep_layer: of
    the encoder, from 0, negative ones from the last; published are 8 and -2 for the 24 layers of
    CLIP, 15 and -1 for the 32 of Qwen2.5-VL; a third of them where middle_layer is None.
    reference_compat: see the module.
    positions, newlines: as VisualOptions has them.
    """

    alpha: float = 0.1
    middle_layer: int | None = None
    deep_layer: int = -2
    reference_compat: bool = False

    adapters = ("vision_language", "timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio, "nearest"))

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The two that are read.

        Raises:
            ValueError: the encoder has not as many layers.
        """
        middle = self.middle_layer
        if middle is None:
            middle = max(0, min(num_layers // 3, self.deep_layer % num_layers - 1))
        for name, layer in (("middle_layer", middle), ("deep_layer", self.deep_layer)):
            if not -num_layers <= layer < num_layers:
                raise ValueError(f"{name} must be one of {num_layers} layers, got {layer}")
        return [middle, self.deep_layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop."""
        layout = call.layout
        grid = call.grid if layout is None or layout.num_crops == 1 else layout.crop_grid

        def select(middle: Tensor, deep: Tensor, k: int, valid: Tensor) -> Tensor:
            compat = self.reference_compat
            return select_tokens(
                middle, deep, k, grid, valid, alpha=self.alpha, reference_compat=compat
            )

        maps = [
            head_mean(call.received_attention(layer))
            for layer in self.encoder_layers(call.num_layers)
        ]
        return select_in_crops(call, self.count(call.tokens.shape[1]), select, *maps)

    def layers(self, num_layers: int) -> list[int]:
        """The middle layer, which keeps all, and the deep one."""
        middle, deep = (layer % num_layers for layer in self.encoder_layers(num_layers))
        if middle >= deep:
            raise ValueError(
                f"middle_layer must come before deep_layer, got {middle} and {deep} of "
                f"{num_layers} layers"
            )
        return [middle, deep] if self.ratio != 1 else []

    def plan(self, call: ReductionCall) -> Tensor | None:
        """select_tokens in the deep layer.

        Raises:
            ValueError: the patches are no square.
        """
        patches = call.tokens.shape[1] - call.num_prefix
        count = self.count(patches)
        if count >= patches:
            return None
        seen = call.received_attention().mean(1)[:, call.num_prefix :]
        if call.layer == self.layers(call.num_layers)[0]:
            call.carried["hiprune"] = seen
            return None
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"hiprune needs a square of patches, got {patches}")
        chosen = select_tokens(
            finite(call.carried["hiprune"]),
            finite(seen),
            count,
            (side, side),
            alpha=self.alpha,
            reference_compat=self.reference_compat,
        )
        return behind_prefix(chosen, call.num_prefix)


METHOD = Method(
    title=(
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language "
        "Models"
    ),
    arxiv="2508.00553",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.VISION_ENCODER),
    status="exact",
    summary="keep anchors of a middle layer, their neighbours, and what a deep layer attends to",
    options=HipruneOptions,
)
