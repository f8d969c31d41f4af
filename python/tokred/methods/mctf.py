"""MCTF: ToMe by similarity, importance and size at once, in both directions between the two sets.

Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers (arXiv
2403.10030).

An approximate version: importance is the attention of the same layer, between whose attention and
MLP tokens merge; the paper computes that of the next layer one step ahead and merges before it.
All tokens that are linked, directly or over two links, are averaged by the weights they had before.
The authors' code masks the prefix among the sources alone, which lets the second of two prefix
tokens merge; here no prefix token takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred.schedule import Schedule, parse_r, resolve

from ._lists import check_minimum
from ._maps import identity, link_best, map_of_links, merged
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def criteria_weight(
    attention: Tensor, size: Tensor, tau_sim: float, tau_info: float, tau_size: float
) -> Tensor:
    """The factor of a token in the weight of every pair, to the power of tau_sim.

    A pair weighs ((cos + 1) / 2)^(1 / tau_sim) (i_a i_b)^(1 / tau_info) (z_a z_b)^(1 / tau_size),
    with i = 1 / attention and z = 1 / size, each over its largest of the item. Its power of
    tau_sim ranks alike, and is what tokred.match computes with this factor on both sides.

    Args:
        attention: f32 [B, N], the mean attention each token receives. size: f32 [B, N].

    Returns:
        f32 [B, N].
    """

    def inverse(x: Tensor) -> Tensor:
        inverted = 1 / x.clamp(min=torch.finfo(torch.float32).tiny)
        return inverted / inverted.amax(1, keepdim=True)

    rarity = inverse(attention) ** (tau_sim / tau_info)
    return rarity * inverse(size) ** (tau_sim / tau_size)


def mctf_plan(
    x: Tensor, weight: Tensor, r: int, num_prefix: int = 0, bidirectional: bool = True
) -> tuple[Tensor, int]:
    """The map of one layer.

    Args:
        x: [B, N, C], the tokens, on which similarity is measured.
        weight: f32 [B, N], criteria_weight.
        r: tokens that merge, at most half of those after the prefix.
        bidirectional: r // 2 even tokens merge into odd ones, then the other r - r // 2 among the
            odd ones (with what they hold) into the even ones that are left; else all r are even.

    Returns:
        (token_map i32 [B, N], N - r).

    O(B N^2 C) time, O(B N) memory.
    """
    tokens = x.shape[1]
    position = torch.arange(tokens, dtype=torch.int32, device=x.device)
    even, odd = position[0::2], position[1::2]
    a, b, weight_a, weight_b = x[:, 0::2], x[:, 1::2], weight[:, 0::2], weight[:, 1::2]
    may_a, may_b = ((side >= num_prefix).expand(x.shape[0], -1) for side in (even, odd))
    weight_a, weight_b = weight_a.contiguous(), weight_b.contiguous()
    a, b = a.contiguous(), b.contiguous()
    first = r // 2 if bidirectional else r
    score, partner = tokred.match(
        a, b, may_a.contiguous(), may_b.contiguous(), weight_a, weight_b, "half_cosine"
    )
    partner = torch.where(partner >= 0, 2 * partner + 1, -1)
    links = link_best(identity(x), score, partner, even, first)
    if r > first:
        left = may_a & (links[:, 0::2] == even)
        score, partner = tokred.match(
            b, a, may_b.contiguous(), left.contiguous(), weight_b, weight_a, "half_cosine"
        )
        partner = torch.where(partner >= 0, 2 * partner, -1)
        links = link_best(links, score, partner, odd, r - first)
        links = links.gather(1, links.long())  # over two links
    token_map, _ = map_of_links(links)
    return token_map, tokens - r


@dataclass(frozen=True)
class MctfOptions(Options):
    """Options of tokred.patch(model, "mctf", ...).

    r is a schedule (tokred.schedule.parse_r), by default 16 in every layer but the first, 0 in all
    leaves the model as it is; min_tokens are left in any case. tau_sim, tau_info and tau_size are
    the temperatures of the three criteria, the larger the less it counts. bidirectional: see
    mctf_plan.
    """

    r: Schedule | None = None
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    min_tokens: int = 10

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        check_minimum(1, min_tokens=self.min_tokens)

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return [layer for layer, amount in enumerate(self._amounts(num_layers)) if amount]

    def plan(self, call: ReductionCall) -> Reduction:
        """mctf_plan, with the attention and the sizes of the layer, pooled by their product."""
        tokens = call.tokens.shape[1]
        r = resolve(self._amounts(call.num_layers)[call.layer], tokens, call.num_prefix)
        r = min(r, max(tokens - self.min_tokens, 0))
        if r == 0:
            return None
        attention = call.received_attention().mean(1)
        size = torch.ones_like(attention) if call.size is None else call.size.float()
        weight = criteria_weight(attention, size, self.tau_sim, self.tau_info, self.tau_size)
        plan = mctf_plan(call.features, weight, r, call.num_prefix, self.bidirectional)
        return merged(call, *plan, weight=attention)

    def _amounts(self, num_layers: int) -> list:
        return parse_r(num_layers, [0, *[16] * (num_layers - 1)] if self.r is None else self.r)


METHOD = Method(
    title=(
        "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision "
        "Transformers"
    ),
    arxiv="2403.10030",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="match by similarity, importance and size in both directions, pool by attention",
    options=MctfOptions,
)
