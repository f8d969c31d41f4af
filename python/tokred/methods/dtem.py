"""DTEM: learn what merging measures similarity on, through a soft choice of the tokens that merge.

Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers (arXiv
2412.10569).

In training `soft_merge` stands where ToMe's hard merge does: all tokens stay, with weights that go
to 0 where they have merged. Afterwards `hard_plan` merges as ToMe does, on the learned embedding.
The soft choice is differentiable in every pair of tokens, so it holds B N^2 / 4 numbers a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._lists import check_count
from ._method import Family, Method, Needs
from .tome import tome_plan


def soft_choice(
    score: Tensor,
    k: int,
    temperature: float = 1.0,
    sharpness: float = 30.0,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """How much every source goes to every destination where k of the sources are to merge.

    k times a softmax over all pairs is added up, after which sources it has taken count less. The
    sum of a source's row is at most 1.

    Args:
        score: [B, Na, Nb], similarities. temperature divides them once, sharpness multiplies them
            in every softmax; at large sharpness this is the choice of the k best pairs of distinct
            sources.
        mask: bool [B, Na, Nb] (or broadcast to it), the pairs that may merge.
        eps: the smallest that is left of a source.

    Returns:
        [B, Na, Nb], differentiable in score. O(k B Na Nb) time and, with a gradient, memory.

    Raises:
        ValueError: a negative k, or a temperature that is not above 0.
    """
    check_count("k", k)
    if not temperature > 0 or not sharpness > 0:
        raise ValueError(
            f"temperature and sharpness must be above 0, got {temperature} and {sharpness}"
        )
    x = score / temperature
    if mask is not None:
        x = x.masked_fill(~mask, torch.finfo(x.dtype).min / (2 * sharpness))
    total = torch.zeros_like(x)
    for _ in range(k):
        share = (x * sharpness).flatten(1).softmax(-1).view_as(x)
        total = total + share
        x = x + (1 - share.sum(-1, keepdim=True)).clamp(min=eps).log()
    total = total / ((total.sum(-1, keepdim=True) - 1).clamp(min=0) + 1)
    return total if mask is None else total.masked_fill(~mask, 0)


def soft_merge(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, choice: Tensor) -> tuple:
    """Merges sources into destinations by shares.

    Args:
        a: [B, Na, C], weight_a: [B, Na], the sources and their sizes. b, weight_b: the
            destinations. choice: [B, Na, Nb], soft_choice.

    Returns:
        (b [B, Nb, C], weight_a [B, Na], weight_b [B, Nb]) afterwards; attention is in proportion to
        the weights. The sources stay as they are, with what is left of their weight.
    """
    given = choice.transpose(1, 2) * weight_a[:, None]
    new_weight = weight_b + given.sum(-1)
    merged = (weight_b[..., None] * b + given @ a) / new_weight[..., None]
    return merged, weight_a * (1 - choice.sum(-1)).clamp(0, 1), new_weight


def cosine_scores(embedding: Tensor, num_prefix: int = 0) -> tuple[Tensor, Tensor]:
    """The cosines of ToMe's sets, even and odd tokens, and the pairs that may merge.

    Args:
        embedding: [B, N, D], the learned embedding of the tokens.

    Returns:
        (score [B, Na, Nb], mask bool [1, Na, Nb]) for soft_choice.
    """
    unit = functional.normalize(embedding, dim=-1)
    position = torch.arange(embedding.shape[1], device=embedding.device) >= num_prefix
    mask = position[0::2, None] & position[1::2]
    return unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2), mask[None]


def hard_plan(embedding: Tensor, r: int, num_prefix: int = 0) -> tuple[Tensor, int] | None:
    """(token_map i32 [B, N], N - r) of ToMe on the learned embedding [B, N, D]; None where r is 0.

    O(B N^2 D) time, O(B N) memory.
    """
    return tome_plan(embedding.detach(), num_prefix, r)


METHOD = Method(
    title="Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers",
    arxiv="2412.10569",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="learn the embedding that merging compares, through a soft choice of what merges",
)
