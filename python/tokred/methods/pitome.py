"""PiToMe: merge inside dense clusters only, found by an energy score per token.

Accelerating Transformers with Spectrum-Preserving Token Merging (NeurIPS 2024, arXiv 2405.16148).

The groups are the published ones. Inside the output, protected tokens keep their position order
instead of the order of their energy, which no later layer depends on beyond its own ranking.
Padding masks of text merge by their maximum: tokred.merge(mask, token_map, num_out, mode="amax").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

import tokred

from ._maps import drop_sources, every_second
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import ReductionCall


def energy(metric: torch.Tensor, margin: float, kind: str = "vision") -> torch.Tensor:
    """How dense the neighbourhood of each token is: mean_j phi(cos(i, j)).

    Args:
        metric: [B, N, C].
        margin: similarities below it hardly count; the published values fall from layer to layer.
        kind: "vision", phi(c) = ELU(c - margin); "text", phi(c) = the normal density of 1 - c
            with standard deviation 1 - margin.

    Returns:
        f32 [B, N], high for tokens with many near-duplicates. O(B N^2 C) time, O(B N) memory.

    Raises:
        ValueError: an unknown kind, or a text margin of 1 or more.
    """
    if kind not in ("vision", "text"):
        raise ValueError(f'kind must be "vision" or "text", not {kind!r}')
    if kind == "text" and not margin < 1:
        raise ValueError(f"margin must be below 1 for the text energy, not {margin}")
    rule = "elu" if kind == "vision" else "gaussian"
    # Energies only rank the tokens, so nothing learns through them.
    return tokred.similarity_stats(metric.detach(), energy=rule, margin=margin).energy


def pitome_plan(
    metric: torch.Tensor,
    num_prefix: int,
    ratio: float,
    margin: float = 0.9,
    variant: str = "pitome",
    kind: str = "vision",
    mode: str = "merge",
) -> tuple[torch.Tensor, int] | None:
    """The map of one layer.

    Args:
        metric: [B, N, C], the keys averaged over the heads.
        num_prefix: the first tokens that must not take part.
        ratio: the share of the other T = N - num_prefix tokens to keep, from 0.5 to 1;
            r = floor(T - T ratio) in double precision, as published: where rounding makes T ratio
            a little too large one token less merges, as with T = 25 and ratio = 0.56.
        margin, kind: as in energy.
        variant: "pitome": the 2r tokens of highest energy are mergeable, every second of them
            (vision) or the first half (text) goes to its most similar partner in the rest, all
            others are protected; "bsm": all tokens are split by the parity of their energy rank
            and the r most similar pairs merge; "tome": they are split by the parity of their
            position, with no energy, as ToMe does.
        mode: "merge", or "prune": what would merge is dropped, and its partner stays as it is.

    Returns:
        (token_map i32 [B, N], N - r), or None where r comes to 0. O(B N^2 C) time.

    Raises:
        ValueError: a ratio outside [0.5, 1], an unknown variant, kind or mode.
    """
    if not 0.5 <= ratio <= 1:
        raise ValueError(
            f"ratio is the share of tokens to keep: at most half can merge, so it must be in "
            f"[0.5, 1], not {ratio}"
        )
    if variant not in ("pitome", "bsm", "tome"):
        raise ValueError(f'variant must be "pitome", "bsm" or "tome", not {variant!r}')
    if mode not in ("merge", "prune"):
        raise ValueError(f'mode must be "merge" or "prune", not {mode!r}')
    tokens = metric.shape[1]
    rest = max(tokens - num_prefix, 0)
    r = min(math.floor(rest - rest * ratio), rest // 2)
    if r == 0:
        return None
    if variant == "tome":
        token_map = tokred.bipartite_soft_matching(metric, r, num_prefix)
        if mode == "prune":
            token_map = drop_sources(token_map, every_second(tokens, num_prefix, metric.device))
        return token_map, tokens - r
    score = energy(metric[:, num_prefix:], margin, kind)
    order = score.argsort(dim=1, descending=True, stable=True).to(torch.int32) + num_prefix
    if variant == "pitome" and kind == "text":
        sources, destinations = order[:, :r], order[:, r : 2 * r]
    else:
        mergeable = order[:, : 2 * r] if variant == "pitome" else order
        sources, destinations = mergeable[:, 0::2], mergeable[:, 1::2]
    # A copy in any case: torch calls every empty tensor contiguous, whatever its strides.
    sources, destinations = (
        side.clone(memory_format=torch.contiguous_format) for side in (sources, destinations)
    )
    token_map = tokred.bipartite_soft_matching(
        metric, r, num_prefix, sources=sources, destinations=destinations
    )
    if mode == "prune":
        taken = torch.zeros_like(token_map, dtype=torch.bool).scatter(1, destinations.long(), True)
        token_map = drop_sources(token_map, taken)
    return token_map, tokens - r


@dataclass(frozen=True)
class LayerRule:
    """The margin of the first layer, and which half of the layers uses the "bsm" variant.

    drop: how far the margin falls from the first layer on, the whole margin where None. kind: of
    the energy. tome_layers: so many of the first layers split by position. num_layers: only so many
    of the first layers merge, all where None.
    """

    margin: float
    bsm: str = "none"
    drop: float | None = None
    kind: Literal["vision", "text"] = "vision"
    tome_layers: int = 0
    num_layers: int | None = None

    def bsm_layers(self, num_layers: int) -> int:
        """How many layers use the "bsm" variant; of an odd number, the first half is the larger."""
        halves = {"none": 0, "first": (num_layers + 1) // 2, "last": num_layers // 2}
        return halves[self.bsm]


RULES = {
    "deit": LayerRule(0.75, "first"),
    "mae": LayerRule(0.75, "last"),
    "augreg": LayerRule(0.9),
    "blip": LayerRule(0.9),
    "blip2": LayerRule(0.75, drop=0.4),
    "clip": LayerRule(0.9, tome_layers=13),
    "lavis_clip": LayerRule(0.95),
    "bert": LayerRule(0.9, drop=0.25, kind="text", num_layers=3),
}


@dataclass(frozen=True)
class PitomeOptions(Options):
    """Options of tokred.patch(model, "pitome", ...).

    ratio is the share of tokens each layer keeps. rule names the published layer rule: "deit"
    (margin 0.75, the first half of the layers use the "bsm" variant), "mae" (0.75, the second half
    does), "augreg" and "blip" (0.9, no layer does), "blip2" (0.75, falling by 0.4), "clip" (0.9,
    the layers up to the thirteenth split as ToMe does), "lavis_clip" (0.95), "bert" (0.9, falling
    by 0.25, the energy of text, in the first three layers alone). The other options change it: the
    margin of layer l of L is margin - margin_drop * l / L, with margin_drop = margin by default,
    and bsm_layers is how many layers use "bsm", the last ones with "mae", otherwise the first.
    mode: "merge", or "prune", which drops what would merge.

    The paper attends in proportion to the tokens' sizes, as tokred.patch does by default; the
    authors' code for ViTs does not: prop_attn=False follows it. Their code for CLIP measures
    similarity on the tokens, here as everywhere on the keys.
    """

    ratio: float = 0.9
    rule: str = "deit"
    margin: float | None = None
    margin_drop: float | None = None
    bsm_layers: int | None = None
    mode: Literal["merge", "prune"] = "merge"

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {self.rule!r}")
        if not 0.5 <= self.ratio <= 1:
            raise ValueError(
                "ratio is the share of tokens to keep: at most half can merge, so it must be in "
                f"[0.5, 1], not {self.ratio}"
            )
        if self.bsm_layers is not None and self.bsm_layers < 0:
            raise ValueError(f"bsm_layers must be at least 0, not {self.bsm_layers}")

    def layers(self, num_layers: int) -> range:
        """All layers of the rule, unless they keep all tokens."""
        most = RULES[self.rule].num_layers
        count = num_layers if most is None else min(most, num_layers)
        return range(count if self.ratio < 1 else 0)

    def plan(self, call: ReductionCall) -> tuple[torch.Tensor, int] | None:
        """pitome_plan of the mean keys, by the layer's rule."""
        margin, variant = self.layer_rule(call.layer, call.num_layers)
        kind = RULES[self.rule].kind
        return pitome_plan(
            call.mean_keys, call.num_prefix, self.ratio, margin, variant, kind, self.mode
        )

    def layer_rule(self, layer: int, num_layers: int) -> tuple[float, str]:
        """(margin, variant) of a layer."""
        rule = RULES[self.rule]
        margin = rule.margin if self.margin is None else self.margin
        published = margin if rule.drop is None else rule.drop
        drop = published if self.margin_drop is None else self.margin_drop
        count = rule.bsm_layers(num_layers) if self.bsm_layers is None else self.bsm_layers
        first = max(num_layers - count, 0) if rule.bsm == "last" else 0
        variant = "bsm" if first <= layer < first + count else "pitome"
        if layer < rule.tome_layers and self.bsm_layers is None:
            variant = "tome"
        return margin - drop * layer / num_layers, variant


METHOD = Method(
    title="Accelerating Transformers with Spectrum-Preserving Token Merging",
    arxiv="2405.16148",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="merge only inside dense clusters, which an energy score finds; keep lone tokens",
    options=PitomeOptions,
)
