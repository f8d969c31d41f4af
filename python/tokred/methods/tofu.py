"""ToFu: drop the sources of bipartite matching in early layers, fuse them by norm in later ones.

Token Fusion: Bridging the Gap between Token Pruning and Token Merging (arXiv 2312.01026).

The fused token points where the sum of its members does, and is as long as the longest of them
(MLERP). A port that is in use divides by the norm of the destination from before it is fused, which
changes the length of the result; that is not followed. Which layers drop is set by an option, as
the paper decides it per model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tokred
from tokred.schedule import Schedule, parse_r, reducing_layers, resolve

from ._maps import drop_sources, every_second, merged
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


@dataclass(frozen=True)
class TofuOptions(Options):
    """Options of tokred.patch(model, "tofu", ...).

    r is a schedule (tokred.schedule.parse_r). prune_layers: so many of the first layers drop the r
    sources and leave their destinations as they are; half of all layers, rounded down, where None.
    """

    r: Schedule = 8
    prune_layers: int | None = None

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune_layers is not None and self.prune_layers < 0:
            raise ValueError(f"prune_layers must be at least 0, got {self.prune_layers}")

    def layers(self, num_layers: int) -> list[int]:
        """The layers whose amount is not 0."""
        return reducing_layers(num_layers, self.r)

    def plan(self, call: ReductionCall) -> Reduction:
        """ToMe's groups of the mean keys, dropped or fused."""
        tokens = call.tokens.shape[1]
        r = resolve(parse_r(call.num_layers, self.r)[call.layer], tokens, call.num_prefix)
        if r == 0:
            return None
        token_map = tokred.bipartite_soft_matching(call.mean_keys, r, call.num_prefix)
        pruned = call.num_layers // 2 if self.prune_layers is None else self.prune_layers
        if call.layer < pruned:
            destinations = every_second(tokens, call.num_prefix, token_map.device)
            return drop_sources(token_map, destinations), tokens - r
        return merged(call, token_map, tokens - r, "maxnorm")


METHOD = Method(
    title="Token Fusion: Bridging the Gap between Token Pruning and Token Merging",
    arxiv="2312.01026",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="drop ToMe's sources in early layers, fuse them without losing length in later ones",
    options=TofuOptions,
)
