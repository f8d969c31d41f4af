"""FastV: after a few layers, half of the visual tokens go: those the last token attends to least.

An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
Vision-Language Models (arXiv 2403.06764).

Ranked by the attention of the prompt's last token over all keys in the layer before, mean over the
heads. The caches of the first layers keep all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ._method import Family, Method, Needs, Options
from ._picks import best

if TYPE_CHECKING:
    from tokred.patching import PromptCall


@dataclass(frozen=True)
class FastvOptions(Options):
    """Options of tokred.patch(model, "fastv", ...).

    ratio: the share of a prompt's visual tokens that stays, in (0, 1]. keep: their number, in place
    of ratio where it is given. layer: the first that runs without the others, at least 1; published
    is 2. positions: "kept", as published, "renumbered", or "auto": kept with M-RoPE alone.
    newlines: "keep" or "drop" the tokens at the ends of rows of patches.
    """

    ratio: float = 0.5
    keep: int | None = None
    layer: int = 2
    positions: Literal["auto", "kept", "renumbered"] = "kept"
    newlines: Literal["keep", "drop"] = "keep"

    adapters = ("vision_language",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, got {self.layer}")

    def prune_layers(self, num_layers: int) -> Sequence[int]:
        """The one layer."""
        if self.layer >= num_layers:
            raise ValueError(f"layer must be below the model's {num_layers}, got {self.layer}")
        return [self.layer]

    def prune(self, call: PromptCall) -> Tensor:
        """The tokens of most attention from the last one, in each row its own share."""
        scores = call.of_visual(call.last_attention().mean(1))
        if self.keep is not None:
            k = torch.full_like(call.original, self.keep)
        else:
            k = (call.original * self.ratio).round().int().clamp(min=1)
        # NaN as the smallest: the prompt's visual tokens are all candidates.
        lowest = torch.finfo(torch.float32).min
        return best(scores.nan_to_num(lowest, None, lowest), k, call.is_slot)


METHOD = Method(
    title=(
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for "
        "Large Vision-Language Models"
    ),
    arxiv="2403.06764",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="after layer 2, drop the half of the visual tokens the last token attends to least",
    options=FastvOptions,
)
