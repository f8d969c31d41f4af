"""CATP: keep visual tokens unlike each other that fit the text, then those that gain attention.

CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning
(arXiv 2508.07871).

An approximate version, after the abstract. Its first stage is maximal marginal relevance here, with
the largest cosine to a word as the relevance; its second adds the growth of the last token's
attention from one layer to a later one to how little a token resembles the others that are left,
both from 0 to 1. Weights and layers are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

import tokred

from ._arguments import check_features, check_scores, features_of, head_mean
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, in_order
from ._thresholds import unit_range
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall, VisualCall


def text_relevance(x: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """f32 [B, N]: the largest cosine of each visual token to a word, -1 without any word.

    Args:
        x: [B, N, C]. text: [B, T, C], with text_mask bool [B, T].

    O(B N T C) time, memory linear in N and T.
    """
    check_features("x", x)
    check_features("text", text, x.shape[0])
    a = features_of(x)
    score, _ = tokred.match(a, features_of(text).to(a.dtype), mask_b=text_mask)
    return score.clamp(min=-1.0)


def select_tokens(
    x: Tensor,
    relevance: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    trade_off: float = 0.5,
) -> Tensor:
    """The first stage: greedy maximal marginal relevance by cosine.

    Args:
        x: [B, N, C], the visual tokens behind the projector.
        relevance: [B, N], text_relevance, taken from 0 to 1.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", or "score", the order of picking.
        trade_off: between relevance (1) and diversity (0).

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape, order or trade-off.
    """
    check_count("k", k)
    check_features("x", x)
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off must be in [0, 1], got {trade_off}")
    check_scores("relevance", relevance, x, valid)
    weight = unit_range(relevance.detach(), valid).contiguous()
    picks = tokred.greedy_select(features_of(x), k, "mmr", weight, mask=valid, trade_off=trade_off)
    return in_order(picks, order)


def growing_attention(
    before: Tensor, after: Tensor, x: Tensor, valid: Tensor | None = None, trade_off: float = 0.5
) -> Tensor:
    """f32 [B, N]: the second stage's score.

    trade_off * (after - before) + (1 - trade_off) * (1 - mean cosine to the others), both from 0 to
    1 over the row.

    Args:
        before, after: [B, H, N] or [B, N], the last token's attention in a layer and a later one.
        x: [B, N, C], the visual tokens there.
    """
    if not 0 <= trade_off <= 1:
        raise ValueError(f"trade_off must be in [0, 1], got {trade_off}")
    gain = unit_range(head_mean(after, "after") - head_mean(before, "before"), valid)
    stats = tokred.similarity_stats(features_of(x), exclude_self=True, mask_a=valid)
    return trade_off * gain + (1 - trade_off) * (1 - unit_range(stats.mean, valid))


@dataclass(frozen=True)
class CatpOptions(VisualOptions):
    """Options of tokred.patch(model, "catp", ...).

    keep: visual tokens kept per image behind the projector. ratio: the share kept instead.
    later_ratio: the share of these, in (0, 1], that the second stage keeps; all at 1.
    first_layer, last_layer: of the language model, before which the last token's attention is read;
    tokens are pruned before the last one. A fifth and a third of them where None.
    trade_off: between relevance, or growth, and diversity.
    positions, newlines: as VisualOptions has them.
    """

    later_ratio: float = 0.5
    first_layer: int | None = None
    last_layer: int | None = None
    trade_off: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.later_ratio <= 1:
            raise ValueError(f"later_ratio must be in (0, 1], got {self.later_ratio}")
        if not 0 <= self.trade_off <= 1:
            raise ValueError(f"trade_off must be in [0, 1], got {self.trade_off}")

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """The first stage.

        Raises:
            ValueError: the text of the prompt is not known.
        """
        if call.text is None:
            raise ValueError(f"catp reads the text of the prompt: {call.why_not}")
        relevance = text_relevance(call.features, call.text, call.text_mask)
        k = self.count(call.tokens.shape[1])
        return select_tokens(call.features, relevance, k, trade_off=self.trade_off)

    def prune_layers(self, num_layers: int) -> list[int]:
        """The two layers; none where the second stage keeps all.

        Raises:
            ValueError: they are no layers with queries and keys before them, in this order.
        """
        if self.later_ratio == 1:
            return []
        first = max(1, num_layers // 5) if self.first_layer is None else self.first_layer
        last = max(first + 1, num_layers // 3) if self.last_layer is None else self.last_layer
        if not 1 <= first < last < num_layers:
            raise ValueError(
                f"first_layer and last_layer must ascend from 1 to {num_layers - 1}, got {first} "
                f"and {last}"
            )
        return [first, last]

    def prune(self, call: PromptCall) -> Tensor | None:
        """The second stage, before the last layer."""
        attention = call.last_attention().mean(1)
        if call.layer == self.prune_layers(call.num_layers)[0]:
            call.carried["attention"] = attention
            return None
        before, after = (call.of_visual(a) for a in (call.carried["attention"], attention))
        x = call.of_visual(call.x, 1)
        scores = growing_attention(before, after, x, call.is_slot, self.trade_off)
        budget = (call.is_slot.sum(1).double() * self.later_ratio).ceil().int()
        places = math.ceil(call.slots.shape[1] * self.later_ratio)
        return best(scores, budget, call.is_slot, places=places)


METHOD = Method(
    title=(
        "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal "
        "In-Context Learning"
    ),
    arxiv="2508.07871",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="approximate",
    summary="keep visual tokens unlike each other that fit the text, then those gaining attention",
    options=CatpOptions,
)
