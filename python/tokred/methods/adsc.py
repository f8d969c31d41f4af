"""ADSC: at chosen layers keep visual tokens at even distances, without any score.

Vision Token Reduction via Attention-Driven Self-Compression for Efficient Multimodal Large Language
Models (arXiv 2602.12618).

The model is trained so, and gathers in the tokens that stay what the others knew. An approximate
version: that tokens are taken at even distances in layers of the language model is published, the
layers and the distances here are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ._method import Family, Method, Needs
from ._prompts import StagedOptions, geometric

if TYPE_CHECKING:
    from tokred.patching import PromptCall


def every(tokens: int, stride: int, device: torch.device | str | None = None) -> Tensor:
    """i32 [ceil(tokens / stride)]: 0, stride, 2 stride, ...

    Raises:
        ValueError: a stride below 1.
    """
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    return torch.arange(0, tokens, stride, dtype=torch.int32, device=device)


def evenly(count: Tensor, k: Tensor, places: int) -> Tensor:
    """k of the first `count` tokens of every row: floor(i count / k), of every stride-th the first.

    Args:
        count, k: integers [B]; k above count means all of them. places: the most of any row.

    Returns:
        i32 [B, places], ascending, -1 behind the last.
    """
    count, k = count.long()[:, None], torch.minimum(k.long(), count.long())[:, None]
    i = torch.arange(places, device=count.device)
    picks = i * count // k.clamp(min=1)
    return torch.where(i < k, picks, -1).to(torch.int32)


@dataclass(frozen=True)
class AdscOptions(StagedOptions):
    """Options of tokred.patch(vlm, "adsc", ...).

    keep: visual tokens of a prompt that are left behind the last stage; 144 of LLaVA's 576, every
    second one of every second one. ratio: their share, in place of keep. Every stage keeps the same
    share of what the one before has left.
    stages: the layers before which tokens are dropped; 8 and 16 of 32 where None.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    keep: int = 144

    published: ClassVar[tuple[int, ...]] = (8, 16)

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """The tokens left: each stage divides them by the same factor."""
        return geometric(tokens, self.end(tokens), (stage + 1) / of)

    def prune(self, call: PromptCall) -> Tensor:
        """Tokens at even distances among those that are left."""
        return evenly(call.is_slot.sum(1), self.budget(call), call.slots.shape[1])


METHOD = Method(
    title=(
        "Vision Token Reduction via Attention-Driven Self-Compression for Efficient Multimodal "
        "Large Language Models"
    ),
    arxiv="2602.12618",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="at chosen layers keep visual tokens at even distances; the model learns to cope",
    options=AdscOptions,
)
