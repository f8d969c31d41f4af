"""EVAD: keep all tokens of the keyframe, and of other frames those that receive most attention.

Efficient Video Action Detection with Token Dropout and Context Refinement (arXiv 2304.08451).

The keyframe's tokens come first in the row, after the prefix, which the paper does not have. Ties
in attention, left to torch's sort there, go to the lower position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._budgets import check_budget, keep_count
from ._dropping import best_tokens, chosen_layers, finite
from ._lists import check_minimum, check_number
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def query_weights(tokens: int, first: int, last: int, weight: float) -> Tensor:
    """f32 [1, 1, N]: `weight` for the queries first .. last - 1 of the keyframe, 1 for others."""
    position = torch.arange(tokens)
    return torch.where((position >= first) & (position < last), weight, 1.0)[None, None].float()


def evad_keep(received: Tensor, ratio: float, num_kept: int) -> Tensor:
    """The tokens that stay: the keyframe's, then those of other frames that receive most attention.

    Args:
        received: f32 [B, N], the (weighted) mean attention of all queries and heads.
        ratio: of all N tokens, ceil(ratio * N) stay.
        num_kept: the first tokens, which stay in any case.

    Returns:
        i32 [B, max(ceil(ratio N), num_kept)]; the others by descending attention.

    Raises:
        ValueError: more tokens must stay than there are.
    """
    tokens = received.shape[1]
    if num_kept > tokens:
        raise ValueError(f"key_tokens and the prefix are {num_kept} of {tokens} tokens")
    count = max(keep_count(tokens, ratio=ratio, rounding="ceil") - num_kept, 0)
    return best_tokens(finite(received), count, num_kept, order="score")


@dataclass(frozen=True)
class EvadOptions(Options):
    """Options of tokred.patch(model, "evad", ...).

    ratio is the share of its tokens that a pruning layer keeps, rounded up; at lists these layers,
    by default a fourth, a half and three fourths in, which are the published 3, 6 and 9 of 12.
    key_tokens: so many tokens after the prefix are those of the keyframe, none by default.
    key_weight: what a query of the keyframe counts, 4 in the paper's enhanced version.
    """

    ratio: float = 0.7
    at: Sequence[int] | None = None
    key_tokens: int = 0
    key_weight: float = 1.0

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)
        check_minimum(0, key_tokens=self.key_tokens)
        check_number(0, key_weight=self.key_weight)

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio < 1 else []

    def plan(self, call: ReductionCall) -> Reduction:
        """evad_keep by the attention that the layer's tokens receive."""
        tokens, kept = call.tokens.shape[1], call.num_prefix + self.key_tokens
        weight = None
        if self.key_tokens and self.key_weight != 1:
            weight = query_weights(tokens, call.num_prefix, kept, self.key_weight)
            weight = weight.to(call.tokens.device)
        received = call.received_attention(weight=weight).mean(1)
        return evad_keep(received, self.ratio, kept)


METHOD = Method(
    title="Efficient Video Action Detection with Token Dropout and Context Refinement",
    arxiv="2304.08451",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="keep the keyframe's tokens, and of other frames those that receive most attention",
    options=EvadOptions,
)
