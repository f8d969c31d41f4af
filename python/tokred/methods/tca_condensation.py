"""TCA: drop the tokens of lowest class attention into one, merge the band above them into a few.

Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation (arXiv 2410.14729).

An approximate version of the condensation in the authors' code: the first centre of the band, which
is drawn at random there, is its token of most attention, so that results repeat; and tokens are
condensed after a layer's attention. As there, the mean over the heads ranks the tokens, where the
paper writes of their ranks in each head. What the dropped tokens become is their sum weighed by
attention, which is not normalised. The reservoir of class tokens and the adapted logits are left
out. The code does not attend in proportion to the tokens' sizes: prop_attn=False follows it. Models
without a class token, which the paper does not have, are ranked by the mean attention that a token
receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._budgets import check_budget, keep_count
from ._dropping import chosen_layers, class_scores, finite
from ._lists import check_minimum
from ._maps import identity, merged
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


@dataclass(frozen=True)
class Condensation:
    """What becomes of the tokens of a layer.

    token_map: i32 [B, N]. weight: f32 [B, N], what each token counts in the sum of its slot.
    num_out: the prefix, those kept by descending score, the merged ones, the dropped ones' sum.
    """

    token_map: Tensor
    weight: Tensor
    num_out: int


def band_sizes(tokens: int, ratio: float) -> tuple[int, int, int]:
    """(kept, merged, dropped) of so many tokens behind the prefix.

    left = ceil(ratio * tokens) tokens are not dropped; of m = tokens + 1 - left the last 2 m of
    these merge, and all of them where there are not as many.
    """
    left = keep_count(tokens, ratio=ratio, rounding="ceil")
    kept = max(left - 2 * (tokens + 1 - left), 0)
    return kept, left - kept, tokens - left


def condense(
    x: Tensor, scores: Tensor, ratio: float = 0.9, num_prefix: int = 1, centres: int = 4
) -> Condensation:
    """The plan of one layer.

    Args:
        x: [B, N, C], the tokens, between which l2 distances are measured.
        scores: f32 [B, N], the class token's attention, the mean of the heads.
        ratio: see band_sizes.
        num_prefix: the first tokens, which stay.
        centres: the merged tokens are the k-centre choice of so many of their band.

    A token of the band joins its nearest centre and weighs 1 / distance there, 1 where that is 0;
    weights of a centre's tokens sum to 1. Dropped tokens weigh their score.

    O(B N centres C) time.
    """
    check_minimum(1, centres=centres)
    batch, tokens, channels = x.shape
    kept, between, dropped = band_sizes(tokens - num_prefix, ratio)
    centres = min(centres, between)
    _, order = tokred.topk(finite(scores)[:, num_prefix:].contiguous(), tokens - num_prefix)
    order = order.long() + num_prefix
    first = num_prefix + kept
    slots = identity(x)
    slots = slots.scatter(1, order[:, :kept], identity(order[:, :kept]) + num_prefix)
    weight = torch.ones(batch, tokens, device=x.device)
    if between:
        band = order[:, kept : kept + between]
        rows = x.gather(1, band[..., None].expand(-1, -1, channels))
        picks = tokred.greedy_select(
            rows, centres, metric="l2", start=torch.zeros_like(band[:, 0], dtype=torch.int32)
        )
        there = picks >= 0
        places = picks.clamp(min=0).long()
        anchors = rows.gather(1, places[..., None].expand(-1, -1, channels))
        score, nearest = tokred.match(rows, anchors, None, there, metric="l2")
        nearest = nearest.clamp(min=0)
        distance = (-score).clamp(min=0).sqrt()
        # A centre is at no distance of itself, whatever rounding says.
        is_centre = places.gather(1, nearest.long()) == torch.arange(between, device=x.device)
        share = torch.where((distance > 0) & ~is_centre, 1 / distance, 1.0)
        share = torch.where(share.isfinite(), share, 0.0)
        total = tokred.segment_pool(
            share[..., None].contiguous(), ids=nearest, num_segments=centres, mode="sum"
        )[..., 0]
        share = share / total.gather(1, nearest.long())
        slots = slots.scatter(1, band, first + nearest)
        weight = weight.scatter(1, band, share)
    if dropped:
        gone = order[:, kept + between :]
        slots = slots.scatter(1, gone, first + centres)
        weight = weight.scatter(1, gone, scores.float().gather(1, gone))
    return Condensation(slots, weight, first + centres + int(dropped > 0))


@dataclass(frozen=True)
class TcaCondensationOptions(Options):
    """Options of tokred.patch(model, "tca_condensation", ...).

    ratio is the share of its tokens (the prefix aside) that a condensing layer does not drop into
    one, see band_sizes; at lists these layers, by default a fourth, a half and three fourths in,
    which are the published 3, 6 and 9 of 12. centres: see condense.
    """

    ratio: float = 0.9
    at: Sequence[int] | None = None
    centres: int = 4

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)
        check_minimum(1, centres=self.centres)

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio < 1 else []

    def plan(self, call: ReductionCall) -> Reduction:
        """condense, where it leaves fewer tokens than there are."""
        tokens = call.tokens.shape[1] - call.num_prefix
        kept, band, dropped = band_sizes(tokens, self.ratio)
        if kept + min(band, self.centres) + (dropped > 0) >= tokens:
            return None
        scores = class_scores(call).mean(1)
        done = condense(call.features, scores, self.ratio, call.num_prefix, self.centres)
        return merged(call, done.token_map, done.num_out, "sum", done.weight)


METHOD = Method(
    title="Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation",
    arxiv="2410.14729",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="merge a band of tokens of middling class attention into four, sum up those below it",
    options=TcaCondensationOptions,
)
