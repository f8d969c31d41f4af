"""EchoingPixels: one budget for the tokens of sound and video together, spent by a learned score.

EchoingPixels: Cross-Modal Adaptive Token Reduction for Efficient Audio-Visual LLMs (arXiv
2512.10324).

The refiner that comes before the scorer is learned, and so are the scorer's weights, which are
arguments. Sampling with Gumbel noise, which trains it, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._budgets import check_budget
from ._method import Family, Method, Needs
from ._picks import best


def token_scores(
    h: Tensor,
    norm: Tensor,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None],
    eps: float = 1e-6,
) -> Tensor:
    """The learned score: RMS norm, a linear layer, SiLU, a linear layer to one number.

    Args:
        h: [B, N, C]. norm: [C], weight of the norm.
        first, second: (weight, bias) of the linear layers, [C', C] and [1, C'].

    Returns:
        f32 [B, N].
    """
    x = h.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
    weights = [None if part is None else part.float() for part in (*first, *second)]
    assert weights[0] is not None and weights[2] is not None
    hidden = functional.silu(functional.linear(x, weights[0], weights[1]))
    return functional.linear(hidden, weights[2], weights[3])[..., 0]


def pooled_keep(
    scores: Tensor,
    candidates: Tensor,
    ratio: float = 0.2,
    valid: Tensor | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """The tokens that stay: all that are no candidates, and the best candidates of all kinds.

    Args:
        scores: f32 [B, N].
        candidates: bool [B, N], the tokens of sound and video; others, such as text, stay.
        ratio: max(1, ceil(ratio * count)) of them stay.
        valid: bool [B, N], False is padding.
        counted: bool [B, N], the tokens that `count` counts, the candidates where None. The
            authors' code counts sound and video where it reduces video alone.

    Returns:
        i32 [B, N], ascending, -1 behind the last.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    check_budget(None, ratio)
    others = ~candidates if valid is None else ~candidates & valid
    may = candidates if valid is None else candidates & valid
    counted = may if counted is None else counted if valid is None else counted & valid
    # The last bit of a product such as 0.1 * 30 must not decide.
    budget = (counted.sum(1).double() * ratio - 1e-9).ceil().long().clamp(min=1)
    budget = torch.minimum(budget, may.sum(1)) + others.sum(1)
    return best(scores, budget, may | others, "position", others)


def gather(tensors: Sequence[Tensor], indices: Tensor, token_dims: Sequence[int]) -> list[Tensor]:
    """The tokens that stay of embeddings, position ids of every axis, cosines and sines.

    Args:
        tensors: each with a batch dimension before its token dimension; zeros stand for -1.
        indices: i32 [B, K]. token_dims: 1 or 2 for each, see tokred.gather_tokens.
    """
    return tokred.gather_tokens(list(tensors), indices, list(token_dims))


METHOD = Method(
    title=("EchoingPixels: Cross-Modal Adaptive Token Reduction for Efficient Audio-Visual LLMs"),
    arxiv="2512.10324",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="one budget for the tokens of sound and video, spent by a learned score",
)
