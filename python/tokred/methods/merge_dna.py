"""MergeDNA: ToMe among neighbours alone, so that groups are words of nearby tokens.

MergeDNA: Context-aware Genome Modeling with Dynamic Tokenization through Token Merging (arXiv
2511.14806).

The merging, by which local layers make words of bases; the models around it are trained with it. A
pair outside the window has no similarity at all. A library that has this matching fills the window
up with zeros at the ends, which beat pairs of negative similarity; that is not followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred.schedule import Schedule, parse_r, reducing_layers, resolve

from ._lists import check_minimum
from ._maps import identity, link_best, map_of_links
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def local_plan(
    metric: Tensor, r: int, window: int, num_prefix: int = 0, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """The map that merges the r most similar pairs of an even and an odd token near each other.

    After the prefix, tokens 0 and 1 are pair 0, 2 and 3 are pair 1 and so on; the even token of
    pair i may merge into the odd one of pair j where |i - j| <= window. Of an odd number of tokens
    the last one takes no part.

    Args:
        metric: [B, N, C]. r: at most the number of pairs. window: at least 0.
        mask: bool [B, N]; a token that is False neither merges nor takes in others.

    Returns:
        (token_map i32 [B, N], N - r), in order of position. Where masks leave fewer than r pairs,
        the last slots of an item stay empty. Maps of several layers compose (tokred.compose), and
        tokred.unmerge gives every base its word.

    O(B N window C) time, O(B N) memory.
    """
    check_minimum(0, window=window)
    tokens = metric.shape[1]
    pairs = max(tokens - num_prefix, 0) // 2
    end = num_prefix + 2 * pairs
    if not 0 <= r <= pairs:
        raise ValueError(f"r must be from 0 to the {pairs} pairs, got {r}")
    sides = [metric[:, num_prefix + side : end : 2].contiguous() for side in (0, 1)]
    masks = [
        None if mask is None else mask[:, num_prefix + side : end : 2].contiguous()
        for side in (0, 1)
    ]
    score, partner = tokred.match(*sides, *masks, band=window)
    sources = torch.arange(num_prefix, end, 2, dtype=torch.int32, device=metric.device)
    partner = torch.where(partner >= 0, num_prefix + 2 * partner + 1, -1)
    token_map, _ = map_of_links(link_best(identity(metric), score, partner, sources, r))
    return token_map, tokens - r


@dataclass(frozen=True)
class MergeDnaOptions(Options):
    """Options of tokred.patch(model, "merge_dna", ...).

    r is a schedule (tokred.schedule.parse_r); window is how many pairs apart two tokens may be.
    """

    r: Schedule = 8
    window: int = 16

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(0, window=self.window)

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return reducing_layers(num_layers, self.r)

    def plan(self, call: ReductionCall) -> Reduction:
        """local_plan of the mean keys, by the layer's amount."""
        amount = parse_r(call.num_layers, self.r)[call.layer]
        r = resolve(amount, call.tokens.shape[1], call.num_prefix)
        return local_plan(call.mean_keys, r, self.window, call.num_prefix) if r else None


METHOD = Method(
    title=(
        "MergeDNA: Context-aware Genome Modeling with Dynamic Tokenization through Token Merging"
    ),
    arxiv="2511.14806",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="merge the r most similar pairs of neighbours within a window",
    options=MergeDnaOptions,
)
