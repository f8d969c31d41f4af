"""ZOO-Prune: keep visual tokens to whose change the projector is sensitive, far from each other.

Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models (arXiv
2509.24837).

The published code perturbs in float16, in which most of the difference is lost; in models patched
here the projector runs in float32 for it, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, check_scores, features_of
from ._budgets import keep_count
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import in_order
from ._thresholds import unit_range
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def directions(number: int, channels: int, seed: int = 0) -> Tensor:
    """f32 [number, channels]: directions of length 1, drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, channels, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=-1)


def sensitivity(
    x: Tensor, project: Callable[[Tensor], Tensor], along: Tensor, step: float = 0.01
) -> Tensor:
    """f32 [B, N]: how much the projection of each token changes, the mean over directions.

    |f(x + step u) - f(x - step u)| / (2 step) for every direction u, the same for all tokens.

    Args:
        x: [B, N, C], the encoder's features. project: the projector, of tokens one by one.
        along: [m, C], directions.

    2 m projections of all tokens.
    """
    check_features("x", x)
    if not step > 0:
        raise ValueError(f"step must be above 0, got {step}")
    if along.dim() != 2 or along.shape[1] != x.shape[2] or len(along) == 0:
        raise ValueError(
            f"along must be [m, {x.shape[2]}] with m at least 1, got {list(along.shape)}"
        )
    x, total = x.detach(), torch.zeros(x.shape[:2], device=x.device)
    for u in along.to(x.device, x.dtype):
        change = project(x + step * u).float() - project(x - step * u).float()
        total = total + change.norm(dim=-1)
    return total / (2 * step * len(along))


def select_tokens(
    x: Tensor,
    sensitive: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """Farthest points by cosine distance, each distance times the token's sensitivity.

    The first one is the most sensitive token; sensitivities count from 0, the smallest, to 1; where
    all are equal, all count as 1.

    Args:
        x: [B, N, C], the projected tokens. sensitive: [B, N].
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score", the order of picking.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape or order.

    At most O(B N k C) time; O(B N C) memory.
    """
    check_count("k", k)
    check_features("x", x)
    check_scores("sensitive", sensitive, x, valid)
    weight = unit_range(sensitive.detach(), valid, 1e-8)
    among = weight if valid is None else weight.masked_fill(~valid, 0.0)
    flat = (among.nan_to_num(0.0) <= 0).all(1, keepdim=True)
    weight = torch.where(flat & ~weight.isnan(), 1.0, weight).contiguous()
    return in_order(tokred.greedy_select(features_of(x), k, weight=weight, mask=valid), order)


@dataclass(frozen=True)
class ZooPruneOptions(VisualOptions):
    """Options of tokred.patch(model, "zoo_prune", ...).

    keep: visual tokens kept per image. ratio: the share kept instead, rounded down.
    directions: so many perturbations, drawn with seed. step: how far they go.
    positions, newlines: as VisualOptions has them.
    """

    directions: int = 64
    step: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not self.step > 0:
            raise ValueError(f"step must be above 0, got {self.step}")

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio))

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image, by the sensitivity of the model's projector."""
        x = call.encoder_features
        along = directions(self.directions, x.shape[2], self.seed)
        sensitive = sensitivity(x, call.project, along, self.step)
        return select_tokens(call.features, sensitive, self.count(call.tokens.shape[1]))


METHOD = Method(
    title=(
        "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models"
    ),
    arxiv="2509.24837",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep visual tokens to which the projector is sensitive, far from each other",
    options=ZooPruneOptions,
)
