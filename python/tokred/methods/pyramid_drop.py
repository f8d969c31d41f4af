"""PyramidDrop: at three depths of the language model drop the visual tokens of lowest attention.

PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction
(arXiv 2410.17247).

Tokens are ranked by the attention that the last token of the prompt would pay them in the layer
that comes next. The release takes the last instruction token, which answers follow in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

import tokred

from ._method import Family, Method, Needs
from ._picks import best
from ._prompts import StagedOptions, geometric

if TYPE_CHECKING:
    from tokred.patching import PromptCall


def instruction_scores(
    q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """The attention that one query pays to every key, averaged over the heads: f32 [B, N].

    Args:
        q: [B, Hq, 1, D], of the last instruction token; k: [B, Hkv, N, D], the keys it may see.
        scale: 1 / sqrt(D) where None. mask: bool [B, N], False for padding.
    """
    return tokred.attention_rows(q.detach(), k.detach(), scale=scale, mask=mask)[:, :, 0].mean(1)


def pyramid_counts(tokens: int, ratio: float = 0.5, stages: int = 3) -> list[int]:
    """int(tokens * ratio^s) for the stages s = 1, 2, ...

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return [int(tokens * ratio ** (stage + 1)) for stage in range(stages)]


def pyramid_drop(
    scores: Tensor, k: int | Tensor, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """The k visual tokens of highest score, which one stage keeps.

    Args:
        scores: [B, N], instruction_scores at the visual tokens that are left.
        k: pyramid_counts of the original number, or integers [B]. valid: bool [B, N].
        order: "position" or "score".

    Returns:
        i32 [B, k], or [B, N] for a k of each row; -1 behind the last.
    """
    return best(scores, k, valid, order)


@dataclass(frozen=True)
class PyramidDropOptions(StagedOptions):
    """Options of tokred.patch(vlm, "pyramid_drop", ...).

    keep: visual tokens of a prompt that are left behind the last stage; 72 of LLaVA's 576, an
    eighth, as published. ratio: their share, in place of keep. Every stage keeps the same share of
    what the one before has left, half of it with three stages and an eighth.
    stages: the layers before which tokens are dropped; 8, 16 and 24 of 32 where None.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    keep: int = 72

    published: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """The tokens left: each stage divides them by the same factor."""
        return geometric(tokens, self.end(tokens), (stage + 1) / of)

    def prune(self, call: PromptCall) -> Tensor:
        """pyramid_drop by the last token's attention in this layer."""
        return self.keep_best(call, call.last_attention("following").mean(1))


METHOD = Method(
    title=(
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy "
        "Reduction"
    ),
    arxiv="2410.17247",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="in three stages keep half of the visual tokens, by the last prompt token's attention",
    options=PyramidDropOptions,
)
