"""EViT: keep the tokens of most class attention, and fuse the others into one.

Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations (arXiv
2202.07800).

Tokens stay in order of attention, as published. The fused one is the sum of the others weighed by
their attention, which is not normalised; in later layers it is a token like any other. Without it
this is the choice of FasterVLM in an encoder. The authors do not attend in proportion to the
tokens' sizes: prop_attn=False follows them. Models without a class token, which the paper does not
have, are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._budgets import check_budget, keep_count
from ._dropping import best_tokens, chosen_layers, class_scores, finite
from ._lists import check_count
from ._maps import identity, merged
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def evit_map(scores: Tensor, keep: int, num_prefix: int = 1) -> tuple[Tensor, int]:
    """The map of one layer: the prefix, the best tokens by descending score, a slot for the others.

    Args:
        scores: f32 [B, N], the mean class attention; that of the prefix does not count.
        keep: tokens after the prefix that stay, fewer than there are.

    Returns:
        (token_map i32 [B, N], num_prefix + keep + 1).

    Raises:
        ValueError: keep is not from 0 to less than the number of tokens.
    """
    check_count("keep", keep, minimum=None)
    tokens = scores.shape[1] - num_prefix
    if not 0 <= keep < tokens:
        raise ValueError(f"keep must be from 0 to {tokens - 1}, got {keep}")
    stays = best_tokens(finite(scores), keep, num_prefix, order="score")
    token_map = torch.full_like(identity(scores), num_prefix + keep)
    return token_map.scatter(1, stays.long(), identity(stays)), num_prefix + keep + 1


@dataclass(frozen=True)
class EvitOptions(Options):
    """Options of tokred.patch(model, "evit", ...).

    ratio is the share of its tokens (the prefix aside, rounded up) that a layer keeps; at lists
    these layers, by default a fourth, a half and three fourths in, which are the published 3, 6 and
    9 of 12. fuse: the others become one token; they are dropped where False.
    """

    ratio: float = 0.7
    at: Sequence[int] | None = None
    fuse: bool = True

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio < 1 else []

    def plan(self, call: ReductionCall) -> Reduction:
        """evit_map by the attention of the class token, where it leaves fewer tokens."""
        tokens = call.tokens.shape[1] - call.num_prefix
        keep = keep_count(tokens, ratio=self.ratio, rounding="ceil")
        if keep + self.fuse >= tokens:
            return None
        scores = class_scores(call).mean(1)
        if not self.fuse:
            return best_tokens(finite(scores), keep, call.num_prefix, order="score")
        token_map, num_out = evit_map(scores, keep, call.num_prefix)
        weight = torch.where(token_map == num_out - 1, scores.float(), 1.0)
        return merged(call, token_map, num_out, "sum", weight)


METHOD = Method(
    title=(
        "Not All Patches are What You Need: Expediting Vision Transformers via Token "
        "Reorganizations"
    ),
    arxiv="2202.07800",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="keep the tokens of most class attention, fuse the others into one",
    options=EvitOptions,
)
