"""Adaptive Sparse ViT: class attention weighed by the heads' importance, against a threshold.

Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention
(arXiv 2209.13802).

The functions follow the authors' code for one image; in a batch it keeps the average number of all
images in order of score, here every image has its own threshold test. In a model this is an
approximate version: the thresholds are learned and let the number of tokens depend on the image, so
that the share `ratio` is kept, ranked by the scores of the layer alone. Tokens leave between the
attention and the MLP of the layer whose attention scores them, before which the code has them leave
the next layer; what stays is the same. Models without a class token, which the paper does not
have, are scored by the mean attention that a token receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._budgets import check_budget
from ._dropping import (
    best_tokens,
    chosen_layers,
    class_scores,
    finite,
    kept_after,
)
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Reduction, ReductionCall


def head_scores(attention: Tensor, out: Tensor) -> Tensor:
    """The class token's attention, each head weighed by its share in the output at the token.

    Args:
        attention: f32 [B, H, N], the class token's. out: [B, H, N, D], what each head's attention
            gives the tokens, before the projection.

    Returns:
        f32 [B, N]: the sum over the heads of attention times |out_h| / (sum of |out_h| + 1e-8).
    """
    norm = out.float().norm(dim=-1)
    return (attention * norm / (norm.sum(1, keepdim=True) + 1e-8)).sum(1)


def running_score(previous: Tensor | None, score: Tensor, decay: float | None = None) -> Tensor:
    """The score over layers: their sum, or with a decay (0.99) their moving average.

    Args:
        previous: f32 [B, N], of the layers before, for the tokens that are left; None in the first.
    """
    if previous is None:
        return score
    return previous + score if decay is None else decay * previous + (1 - decay) * score


def above_threshold(
    scores: Tensor, threshold: float, num_prefix: int = 1, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The prefix and the tokens whose score is above the (learned) threshold.

    Args:
        scores: f32 [B, N], head_scores. threshold: 0.001, 0.002 and 0.003 are what the three layers
            begin their training with. valid: bool [B, N], False is left out.

    Returns:
        (i32 [B, N], by position, -1 behind them; counts i32 [B]).
    """
    position = torch.arange(scores.shape[1], device=scores.device)
    keep = (scores > threshold) | (position < num_prefix)
    return tokred.compact(keep if valid is None else keep & valid)


@dataclass(frozen=True)
class AdaptiveSparseVitOptions(Options):
    """Options of tokred.patch(model, "adaptive_sparse_vit", ...).

    ratio is the share of its tokens (the prefix aside, rounded down, at least one) that a pruning
    layer keeps; at lists these layers, by default a fourth, a half and three fourths in.
    """

    ratio: float = 0.7
    at: Sequence[int] | None = None

    adapters = ("timm", "transformers")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(None, self.ratio)

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio < 1 else []

    def plan(self, call: ReductionCall) -> Reduction:
        """The tokens of the best head_scores."""
        tokens = call.tokens.shape[1] - call.num_prefix
        keep = kept_after(tokens, self.ratio)
        if keep >= tokens:
            return None
        sizes = call.size if call.attends_by_size else None
        bias = None if sizes is None else sizes.log()[:, None]
        q, k, v = call.q, call.k, call.v
        out, _ = tokred.biased_attention(q, k, v, key_bias=bias, scale=call.scale)
        scores = head_scores(class_scores(call), out)
        return best_tokens(finite(scores), keep, call.num_prefix)


METHOD = Method(
    title=(
        "Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting "
        "Self-Attention"
    ),
    arxiv="2209.13802",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER,),
    status="approximate",
    summary="keep the tokens of most class attention, each head weighed by its output there",
    options=AdaptiveSparseVitOptions,
)
