"""DiffRate: drop the tokens of lowest attention, merge the next ones into those that stay.

DiffRate : Differentiable Compression Rate for Efficient Vision Transformers (arXiv 2305.17997).

How many tokens each layer drops and merges is what the paper learns; here they are options. Merged
tokens are means weighted by size, as in ToMe. Models without a class token, which the paper does
not have, are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred
from tokred.schedule import Amount, Schedule, parse_r, resolve

from ._maps import identity, map_of_links
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def diffrate_plan(
    x: Tensor, importance: Tensor, drop: int, merge: int, num_prefix: int = 0
) -> tuple[Tensor, int]:
    """The map of one layer.

    Args:
        x: [B, N, C], the tokens, on which similarity is measured.
        importance: f32 [B, N]; that of the first num_prefix tokens, which stay, does not count.
        drop: so many tokens of lowest importance are dropped.
        merge: so many of the next each merge into the most similar token that stays; a prefix
            token takes in none. drop + merge must leave one token after the prefix.

    Returns:
        (token_map i32 [B, N], N - drop - merge); slots in order of position.

    Raises:
        ValueError: drop + merge leaves none.

    O(B N^2 C) time, O(B N) memory.
    """
    tokens = x.shape[1]
    kept = tokens - num_prefix - drop - merge
    if min(drop, merge) < 0 or kept < 1:
        raise ValueError(
            f"drop and merge must be at least 0 and leave one of {tokens - num_prefix} tokens, got "
            f"{drop} and {merge}"
        )
    order = importance[:, num_prefix:].argsort(dim=1, descending=True, stable=True) + num_prefix
    destinations, sources = order[:, :kept], order[:, kept : kept + merge]
    links = identity(x).scatter(1, order[:, kept + merge :], -1)
    if merge:

        def rows(index: Tensor) -> Tensor:
            return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

        _, partner = tokred.match(rows(sources), rows(destinations))
        links = links.scatter(1, sources, destinations.gather(1, partner.long()).to(torch.int32))
    token_map, _ = map_of_links(links)
    return token_map, tokens - drop - merge


@dataclass(frozen=True)
class DiffrateOptions(Options):
    """Options of tokred.patch(model, "diffrate", ...).

    r is a schedule (tokred.schedule.parse_r) of how many tokens leave every layer, at most half.
    drop, a schedule of ints alone, is how many of these are dropped, the others merge; half of
    them, rounded down, where None. Lists give every layer the numbers that training found for it.
    """

    r: Schedule = 8
    drop: Schedule | None = None

    adapters = ("timm", "transformers")

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0.

        Raises:
            ValueError: drop has a share, or more tokens than r.
        """
        amounts = parse_r(num_layers, self.r)
        for amount, drop in zip(amounts, self._dropped(num_layers), strict=True):
            if isinstance(drop, float) or (drop is not None and drop > amount >= 1):
                raise ValueError(f"drop must be ints, at most r = {amount}, got {drop}")
        return [layer for layer, amount in enumerate(amounts) if amount]

    def plan(self, call: ReductionCall) -> Reduction:
        """diffrate_plan by the attention of the class token."""
        amount = parse_r(call.num_layers, self.r)[call.layer]
        r = resolve(amount, call.tokens.shape[1], call.num_prefix)
        if r == 0:
            return None
        drop = self._dropped(call.num_layers)[call.layer]
        drop = r // 2 if drop is None else min(int(drop), r)
        seen = call.class_attention() if call.num_prefix else call.received_attention()
        return diffrate_plan(call.features, seen.mean(1), drop, r - drop, call.num_prefix)

    def _dropped(self, num_layers: int) -> Sequence[Amount | None]:
        return [None] * num_layers if self.drop is None else parse_r(num_layers, self.drop)


METHOD = Method(
    title="DiffRate : Differentiable Compression Rate for Efficient Vision Transformers",
    arxiv="2305.17997",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="by class attention drop the last tokens and merge the ones before them",
    options=DiffrateOptions,
)
