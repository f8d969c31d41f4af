"""DivPrune: keep visual tokens whose minimum distance to each other is as large as greed gets it.

DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175).

Distances are measured in float32 whatever the tokens' dtype, where the published code measures
them in that dtype; picks of bfloat16 differ for this reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, features_of
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import in_order
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def select_tokens(
    x: Tensor, k: int, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """Max-min diversity by cosine distance, from the token that is farthest from its nearest.

    Args:
        x: [B, N, C], the visual tokens as the language model would read them.
        valid: bool [B, N]; padding, which is False, is not kept, nor is a token that is not finite.
        order: "position", as published, or "score", the order of picking.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape or order.

    O(B N (N + k) C) time: the first pick compares all pairs at worst. O(B N C) memory.
    """
    check_count("k", k)
    check_features("x", x)
    x = features_of(x)
    if not x.is_cuda:
        return in_order(tokred.greedy_select(x, k, mask=valid, first="isolated"), order)
    # There all pairs at once are quicker than the tiles that may hold the first pick one by one.
    nearest = tokred.similarity_stats(x, exclude_self=True, mask_a=valid).largest
    apart = (-nearest).masked_fill(nearest == -torch.inf, -torch.inf)
    _, start = tokred.topk(apart, 1)
    return in_order(tokred.greedy_select(x, k, start=start[:, 0].contiguous(), mask=valid), order)


@dataclass(frozen=True)
class DivpruneOptions(VisualOptions):
    """Options of tokred.patch(model, "divprune", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    positions, newlines: as VisualOptions has them.
    """

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image."""
        return select_tokens(call.features, self.count(call.tokens.shape[1]))


METHOD = Method(
    title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arxiv="2503.02175",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep visual tokens far from each other: max-min diversity",
    options=DivpruneOptions,
)
