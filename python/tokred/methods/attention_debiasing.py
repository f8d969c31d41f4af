"""Attention debiasing: scores over the trend of their position, and none for letter-box padding.

Attention Debiasing for Token Pruning in Vision Language Models (arXiv 2508.17807).

The published trend is a cubic over 576 positions; for another number of tokens it is stretched, or
fitted anew (fit_trend). In a model the scores are those of FastV: the attention of the prompt's
last token in the layer before. Padding inside an image is not known there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._arguments import head_mean
from ._grids import content_mask
from ._method import Family, Method, Needs
from ._picks import best
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall

__all__ = ["content_mask", "debiased", "fit_trend", "position_trend", "select_tokens"]

CUBIC = (2.56911e-8, -1.45979e-5, 3.01520e-3, 1.0)
CUBIC_TOKENS = 576


def position_trend(tokens: int, of: Tensor | None = None) -> Tensor:
    """f32 [B, N]: the published growth of attention with the position, 1 at the first token.

    2.56911e-8 i^3 - 1.45979e-5 i^2 + 3.01520e-3 i + 1 at i from 0 to 575, at even steps.

    Args:
        tokens: N.
        of: integers [B], the tokens that each row has before padding; None is N, [1, N].
    """
    of = torch.tensor([tokens]) if of is None else of
    place = torch.arange(tokens, dtype=torch.float64, device=of.device)
    i = place * ((CUBIC_TOKENS - 1) / (of.double() - 1).clamp(min=1))[:, None]
    a, b, c, d = CUBIC
    return (((a * i + b) * i + c) * i + d).float()


def fit_trend(scores: Tensor, degree: int = 3) -> Tensor:
    """f32 [N]: the trend of the mean scores over positions, by least squares, 1 at the first token.

    Args:
        scores: [S, N], of S samples. degree: of the polynomial.

    Raises:
        ValueError: fewer positions than coefficients.
    """
    if scores.dim() != 2 or scores.shape[1] <= degree:
        raise ValueError(
            f"scores must be [S, N] with N above {degree}, the degree, got {list(scores.shape)}"
        )
    mean = scores.detach().double().mean(0)
    place = torch.linspace(-1, 1, len(mean), dtype=torch.float64, device=mean.device)
    powers = place[:, None] ** torch.arange(degree + 1, device=mean.device)
    fitted = powers @ torch.linalg.lstsq(powers.cpu(), mean.cpu()[:, None]).solution.to(mean.device)
    return (fitted[:, 0] / fitted[0, 0]).float()


def debiased(
    attention: Tensor, trend: Tensor | None = None, content: Tensor | None = None
) -> Tensor:
    """f32 [B, N]: attention, averaged over heads, over the trend; 0 where the image is padding.

    Args:
        attention: [B, H, N] or [B, N], of the last token over the image's.
        trend: f32 [N] or [B | 1, N], position_trend where None.
        content: bool [N] or [B, N], content_mask of each letter-boxed image.
    """
    scores = head_mean(attention)
    trend = position_trend(scores.shape[1]).to(scores.device) if trend is None else trend
    scores = scores / trend
    return scores if content is None else scores * content


def select_tokens(
    attention: Tensor,
    k: int | Tensor,
    valid: Tensor | None = None,
    order: str = "position",
    trend: Tensor | None = None,
    content: Tensor | None = None,
) -> Tensor:
    """The k best tokens by debiased attention; of an image with less content no more than that.

    Args:
        attention: [B, H, N] or [B, N], of the last token over the image's.
        k: an int, or i32 [B].
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score".
        trend, content: see debiased.

    Returns:
        i32 [B, k] ([B, N] for a k of each row), -1 behind the last.

    Raises:
        ValueError: another shape or order.

    O(B H N) time.
    """
    scores = debiased(attention, trend)
    if content is not None:
        content = content.expand_as(scores)
        valid = content if valid is None else content & valid
    return best(scores, k, valid, order)


@dataclass(frozen=True)
class AttentionDebiasingOptions(VisualOptions):
    """Options of tokred.patch(model, "attention_debiasing", ...).

    keep: visual tokens kept per prompt. ratio: the share kept instead.
    layer: of the language model, before which tokens are pruned, by the attention of the one before
    it; where None 2, as in FastV, or the last. positions, newlines: as VisualOptions has them.
    """

    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer must be at least 1, got {self.layer}")

    def prune_layers(self, num_layers: int) -> list[int]:
        """The layer.

        Raises:
            ValueError: the language model has not as many.
        """
        layer = min(2, num_layers - 1) if self.layer is None else self.layer
        if not 1 <= layer < num_layers:
            raise ValueError(f"layer must be from 1 to {num_layers - 1}, got {self.layer}")
        return [layer]

    def prune(self, call: PromptCall) -> Tensor:
        """select_tokens, the trend stretched over the visual tokens of each row."""
        attention = call.of_visual(call.last_attention().mean(1))
        slots = call.slots.shape[1]
        trend = position_trend(slots, call.original)
        places = self.count(slots)
        if self.ratio is None:
            return select_tokens(attention, places, call.is_slot, trend=trend)
        budget = (call.original.double() * self.ratio).round().clamp(min=1).int()
        return select_tokens(attention, budget, call.is_slot, trend=trend)[:, :places]


METHOD = Method(
    title="Attention Debiasing for Token Pruning in Vision Language Models",
    arxiv="2508.17807",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="divide attention scores by the trend of their position, mask letter-box padding",
    options=AttentionDebiasingOptions,
)
