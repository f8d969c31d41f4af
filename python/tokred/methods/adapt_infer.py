"""AdaptInfer: rank visual tokens by the attention of the text, each word weighed by its own.

AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance
(arXiv 2508.06084).

How many tokens each stage keeps is published for averages of 32, 48, 64 and 128 of LLaVA's 576
tokens; other numbers keep as many as 64 in proportion, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs
from ._picks import best
from ._prompts import StagedOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall

TOKENS = 576  # of LLaVA-1.5, for which the table is
COUNTS = {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}


def text_weights(
    q: Tensor,
    k: Tensor,
    text: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    blend: float = 1.0,
) -> Tensor:
    """How much every text token counts in each head: what it gives to and gets from the text.

    Its row and its column of the attention among text tokens, summed, its attention to itself once.
    Rows are shares of the attention over all keys, not of that over the text.

    Args:
        q: [B, Hq, L, D]. k: [B, Hkv, L, D], causal.
        text: bool [B, L], the instruction behind the image.
        scale: 1 / sqrt(D) where None. mask: bool [B, L], False for padding.
        blend: from 1, these weights, to 0, their mean over heads and text tokens for all.

    Returns:
        f32 [B, Hq, L], 0 for other tokens.

    Complexity: O(B Hq L^2 D), memory linear in L.
    """
    return _weights(q.detach(), k.detach(), text, scale, mask, blend)[0]


def guided_scores(
    q: Tensor,
    k: Tensor,
    text: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    blend: float = 1.0,
) -> Tensor:
    """What every token receives from the text, whose tokens count by text_weights: f32 [B, L].

    Args, complexity: as of text_weights; the sum over the heads.
    """
    q, k = q.detach(), k.detach()
    weight, lse = _weights(q, k, text, scale, mask, blend)
    seen = None if mask is None else mask[:, None, None]
    columns = tokred.attention_columns(
        q, k, lse, weight=weight, causal=True, scale=scale, mask=seen
    )
    return columns.sum(1)


def adapt_infer(
    scores: Tensor, k: int | Tensor, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """The k visual tokens of highest score, which one stage keeps.

    Args:
        scores: [B, N], guided_scores at the visual tokens that are left.
        k: tokens that stay, or integers [B]. valid: bool [B, N]. order: "position" or "score".

    Returns:
        i32 [B, k], or [B, N] for a k of each row; -1 behind the last.
    """
    return best(scores, k, valid, order)


def _weights(
    q: Tensor, k: Tensor, text: Tensor, scale: float | None, mask: Tensor | None, blend: float
) -> tuple[Tensor, Tensor]:
    """text_weights, and the lse of the attention, f32 [B, Hq, L]."""
    seen = None if mask is None else mask[:, None, None]
    inside = text if mask is None else text & mask
    among = inside[:, None]
    # What a row gives to the text follows from its two denominators.
    lse = _lse(q, k, scale, seen)
    given = (_lse(q, k, scale, inside[:, None, None]) - lse).exp()
    ones = among.float().expand(-1, q.shape[1], -1).contiguous()
    received = tokred.attention_columns(q, k, lse, weight=ones, causal=True, scale=scale, mask=seen)
    weights = torch.where(among, given + received - _own(q, k, lse, scale), 0)
    if blend != 1:
        count = among.sum(-1, keepdim=True).clamp(min=1) * q.shape[1]
        mean = weights.sum((1, 2), keepdim=True) / count
        weights = torch.where(among, blend * weights + (1 - blend) * mean, 0)
    return weights.contiguous(), lse


def _lse(q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """f32 [B, Hq, L]; one value a key is the smallest that can be attended to."""
    return tokred.biased_attention(q, k, k[..., :1], causal=True, scale=scale, mask=mask)[1]


def _own(q: Tensor, k: Tensor, lse: Tensor, scale: float | None) -> Tensor:
    """f32 [B, Hq, L]: the attention of every token to itself."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    grouped = q.float().unflatten(1, (k.shape[1], group))
    logits = (grouped * k.float()[:, :, None]).sum(-1).flatten(1, 2) * scale
    return (logits - lse).exp()


@dataclass(frozen=True)
class AdaptInferOptions(StagedOptions):
    """Options of tokred.patch(vlm, "adapt_infer", ...).

    keep: visual tokens of a prompt that the layers have on average, with the published numbers for
    each stage of 32, 48, 64 and 128; others are those of 64 in proportion. ratio: that share of
    LLaVA's 576 in proportion to what a prompt has, in place of keep.
    stages: the three layers before which tokens are dropped; 2, 11 and 21 of 32 where None, which
    come behind the published 1, 10 and 20. The text is that behind the images; where there is none,
    no token is better than another, and the first ones stay.
    blend: how much the weights of text tokens differ: 1 as published, 0 not at all.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    blend: float = 1.0

    published: ClassVar[tuple[int, ...]] = (2, 11, 21)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend must be in [0, 1], got {self.blend}")
        if self.stages is not None and len(self.stages) != len(self.published):
            raise ValueError(f"stages must be three layers, got {self.stages}")

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """From the table, or in proportion."""
        if self.ratio is None:
            return tokens.clamp(max=self._count(self.keep)[stage])
        share = 1.0 if self.ratio == 1 else self._count(self.ratio * TOKENS)[stage] / TOKENS
        return tokens * min(share, 1.0)

    def _count(self, average: float) -> tuple[float, ...]:
        if average in COUNTS:
            return COUNTS[int(average)]
        return tuple(count * average / 64 for count in COUNTS[64])

    def prune(self, call: PromptCall) -> Tensor:
        """guided_scores in the layer before, by the text behind the image."""
        q, k = call.heads("previous")
        scores = guided_scores(q, k, call.after_images, call.scale, call.valid, self.blend)
        return self.keep_best(call, scores)


METHOD = Method(
    title=(
        "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical "
        "Text Guidance"
    ),
    arxiv="2508.06084",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="in three stages keep the visual tokens that the text most attended to attends to most",
    options=AdaptInferOptions,
)
