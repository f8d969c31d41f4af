"""IDPruner: keep visual tokens that are important and unlike those kept, by marginal relevance.

IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs (arXiv 2602.13315).

The importance is what a small network learns, so it is an argument; in a model the class attention
of the encoder takes its place, or the mean attention that a token receives where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

import tokred

from ._arguments import check_features, check_scores, features_of
from ._crops import encoder_attention
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import in_order
from ._thresholds import unit_range
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    trade_off: float = 0.5,
) -> Tensor:
    """Greedy maximal marginal relevance, one token after another.

    argmax of trade_off * importance - (1 - trade_off) * largest cosine to the tokens kept, with
    importance = (s - min) / (max - min + 1e-6); the first one is the most important.

    Args:
        x: [B, N, C], the visual tokens as the language model would read them.
        scores: [B, N], s.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score", the order of picking.
        trade_off: in [0, 1].

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape, order or trade-off.

    At most O(B N k C) time; O(B N C) memory.
    """
    check_count("k", k)
    check_features("x", x)
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off must be in [0, 1], got {trade_off}")
    check_scores("scores", scores, x, valid)
    importance = unit_range(scores.detach(), valid, 1e-6).contiguous()
    picks = tokred.greedy_select(
        features_of(x), k, "mmr", importance, mask=valid, trade_off=trade_off
    )
    return in_order(picks, order)


@dataclass(frozen=True)
class IdprunerOptions(VisualOptions):
    """Options of tokred.patch(model, "idpruner", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    trade_off: between importance (1) and diversity (0). layer: of the encoder, whose attention is
    the importance. positions, newlines: as VisualOptions has them.
    """

    trade_off: float = 0.5
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.trade_off <= 1:
            raise ValueError(f"trade_off must be in [0, 1], got {self.trade_off}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image."""
        scores = encoder_attention(call, self.layer)
        k = self.count(call.tokens.shape[1])
        return select_tokens(call.features, scores, k, trade_off=self.trade_off)


METHOD = Method(
    title="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
    arxiv="2602.13315",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep visual tokens that are important and unlike those kept",
    options=IdprunerOptions,
)
