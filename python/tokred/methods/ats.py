"""ATS: sample tokens by the attention of the class token times the norm of their value.

Adaptive Token Sampling For Efficient Vision Transformers (arXiv 2111.15667).

The functions follow the authors' code. In a model this is an approximate version: how many
different tokens the samples pick depends on the image, and here every image keeps the same number,
its picks and then the tokens of highest score among the others, in order of position. Tokens are
dropped after the layer's attention, which is what attention for the sampled queries alone gives.
Models without a class token, which the paper does not have, are scored by the mean attention that a
token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._budgets import check_budget
from ._dropping import behind_prefix, class_scores, finite, kept_after
from ._lists import check_count
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def significance(attention: Tensor, v: Tensor) -> Tensor:
    """The share of every token in the class token's attention, weighed by the norm of its value.

    Args:
        attention: f32 [B, H, N], the class token's. v: [B, H, N, D]; the norm is that of the values
            of all heads in a row.

    Returns:
        f32 [B, N], each row's sum 1; 0 where all are 0.
    """
    norm = v.float().square().sum((1, 3)).sqrt()
    score = attention.sum(1) * norm
    return score / score.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def ats_sample(
    scores: Tensor, num_samples: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that inverse transform sampling picks, each once, with the count of every item.

    Args:
        scores: f32 [B, N], significance of the tokens without the class token. num_samples: at
            most so many are picked. mask: bool [B, N], False is never picked.

    Returns:
        (i32 [B, num_samples], by ascending score, -1 behind them; counts i32 [B]). The token of
        lowest score is never picked where several have one.
    """
    return tokred.inverse_transform_sample(scores, num_samples, mask)


def ats_keep(scores: Tensor, keep: int) -> Tensor:
    """As many tokens of every item: what `keep` samples pick, then those of highest score.

    Args:
        scores: f32 [B, N], of the tokens without the prefix. keep: from 0 to N.

    Returns:
        i32 [B, keep], in order of position.

    Raises:
        ValueError: keep is more than there are tokens.
    """
    check_count("keep", keep, minimum=None)
    batch, tokens = scores.shape
    if not 0 <= keep <= tokens:
        raise ValueError(f"keep must be from 0 to {tokens}, got {keep}")
    picks, _ = tokred.inverse_transform_sample(scores.contiguous(), keep)
    place = torch.where(picks >= 0, picks, tokens).long()
    picked = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=scores.device)
    picked = picked.scatter(1, place, True)[:, :tokens].contiguous()
    return tokred.topk(finite(scores), keep, order="position", must_keep=picked)[1]


@dataclass(frozen=True)
class AtsOptions(Options):
    """Options of tokred.patch(model, "ats", ...).

    ratio is the share of its tokens (the prefix aside, rounded down, at least one) that a layer
    keeps, in the layers from `first` on; first is a fourth of the layers where None, which is the
    published 3 of 12.
    """

    ratio: float = 0.9
    first: int | None = None

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)
        if self.first is not None and self.first < 0:
            raise ValueError(f"first must be at least 0, got {self.first}")

    def layers(self, num_layers: int) -> range:
        """The layers from `first` on, unless they keep all tokens."""
        first = num_layers // 4 if self.first is None else self.first
        return range(first, num_layers if self.ratio < 1 else first)

    def plan(self, call: ReductionCall) -> Reduction:
        """ats_keep by the significance of the layer's tokens."""
        tokens = call.tokens.shape[1] - call.num_prefix
        keep = kept_after(tokens, self.ratio)
        if keep >= tokens:
            return None
        scores = significance(class_scores(call), call.v)[:, call.num_prefix :]
        return behind_prefix(ats_keep(scores, keep), call.num_prefix)


METHOD = Method(
    title="Adaptive Token Sampling For Efficient Vision Transformers",
    arxiv="2111.15667",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="sample tokens at even steps of the class token's cumulative attention",
    options=AtsOptions,
)
