"""SCOPE: keep the visual tokens that add most to the coverage of all, weighed by saliency.

SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs (arXiv 2510.24214).

Encoders without a class token, which the paper does not have, have the mean attention that a token
receives in its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

import tokred

from ._arguments import check_features, check_scores, features_of, head_mean
from ._crops import encoder_attention
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import in_order
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def select_tokens(
    x: Tensor,
    attention: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    alpha: float = 1.0,
) -> Tensor:
    """Greedy facility location: the gain of a token is attention^alpha times the coverage it adds.

    A set covers token i by its largest cosine to a member, 0 where none is above.

    Args:
        x: [B, N, C], the visual tokens. attention: [B, H, N] or [B, N], of the class token.
        valid: bool [B, N]; padding, which is False, is neither kept nor covered.
        order: "position", as published, or "score", the order of picking.
        alpha: 0 leaves the coverage alone.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape or order.

    O(B N^2 C) time for the first gains, then at most O(B N C) a gain that has to be taken anew;
    O(B N C) memory.
    """
    check_count("k", k)
    check_features("x", x)
    weight = head_mean(attention).pow(alpha)
    check_scores("attention", weight, x, valid)
    picks = tokred.greedy_select(features_of(x), k, "facility", weight.contiguous(), mask=valid)
    return in_order(picks, order)


@dataclass(frozen=True)
class ScopeOptions(VisualOptions):
    """Options of tokred.patch(model, "scope", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    alpha: the exponent of the attention. layer: of the encoder, whose attention is read.
    positions, newlines: as VisualOptions has them.
    """

    alpha: float = 1.0
    layer: int = -2

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image."""
        attention = encoder_attention(call, self.layer)
        k = self.count(call.tokens.shape[1])
        return select_tokens(call.features, attention, k, alpha=self.alpha)


METHOD = Method(
    title="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs",
    arxiv="2510.24214",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep the visual tokens that add most coverage, weighed by class attention",
    options=ScopeOptions,
)
