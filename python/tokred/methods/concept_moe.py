"""ConceptMoE: tokens of one concept run through the model as one, chosen where neighbours differ.

ConceptMoE: Adaptive Token-to-Concept Compression for Implicit Compute Allocation (arXiv
2601.21420).

Chunking and dechunking, which H-Net has in much the same way; the projections whose difference
makes a boundary are learned, and come as what they give. A concept is the hidden state at its
boundary. The authors' code carries concepts on by a state-space scan that takes log(1 / (1 - p)),
which is infinite at the first token; tokred.ema_scan needs no such detour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._method import Family, Method, Needs


def boundary_probability(q: Tensor, k: Tensor) -> Tensor:
    """(1 - cos(q_{t-1}, k_t)) / 2: f32 [B, N] in [0, 1], 1 for the first token.

    Args:
        q, k: [B, N, D], two learned projections of the hidden states.

    Differentiable.
    """
    cosine = functional.cosine_similarity(q[:, :-1].float(), k[:, 1:].float(), dim=-1)
    return functional.pad(((1 - cosine) / 2).clamp(0, 1), (1, 0), value=1.0)


@dataclass(frozen=True)
class Concepts:
    """The concepts of a batch, and what brings them back.

    h: [B, K, C], zeros behind a row's last. p: f32 [B, K], the probability of each boundary.
    lengths: i32 [B]. token_map: i32 [B, N], the concept of every token, -1 for padding.
    boundary: bool [B, N]. probability: f32 [B, N], of all tokens.
    """

    h: Tensor
    p: Tensor
    lengths: Tensor
    token_map: Tensor
    boundary: Tensor
    probability: Tensor


def chunk(
    h: Tensor,
    probability: Tensor,
    threshold: float = 0.5,
    mask: Tensor | None = None,
    capacity: int | None = None,
) -> Concepts:
    """Takes the hidden states at the boundaries.

    Args:
        h: [B, N, C]. probability: f32 [B, N], boundary_probability; a boundary is where it reaches
            the threshold.
        mask: bool [B, N], padding at the end of a row is False.
        capacity: K; N where None. Concepts beyond it are left out, with their tokens.

    Differentiable in h and probability.
    """
    boundary = probability >= threshold
    boundary = boundary if mask is None else boundary & mask
    positions, lengths = tokred.compact(boundary, capacity=capacity)
    slots = (boundary.cumsum(1) - 1).to(torch.int32)
    inside = slots < positions.shape[1]
    inside = inside if mask is None else inside & mask
    p = tokred.unmerge(probability[..., None], positions)[..., 0]
    token_map = torch.where(inside, slots, -1)
    return Concepts(tokred.unmerge(h, positions), p, lengths, token_map, boundary, probability)


def dechunk(h: Tensor, concepts: Concepts, residual: Tensor | None = None) -> Tensor:
    """Gives every token its concept, carried on: z_i = (1 - p_i) z_{i-1} + p_i c_i.

    Args:
        h: [B, K, C], the concepts after the model. residual: [B, N, C], added to the result.

    Returns:
        [B, N, C]. Its values are those of z; the gradient reaches the probabilities through z, and
        through the certainty of each choice (p at a boundary, 1 - p elsewhere), as if z had been
        multiplied by it.
    """
    carried, _ = tokred.ema_scan(h, concepts.p, lengths=concepts.lengths)
    z = tokred.unmerge(carried, concepts.token_map)
    certainty = torch.where(concepts.boundary, concepts.probability, 1 - concepts.probability)
    z = z * (1 + certainty - certainty.detach())[..., None].to(z.dtype)
    return z if residual is None else residual + z


def balance_loss(
    boundary: Tensor, probability: Tensor, ratio: float, mask: Tensor | None = None
) -> Tensor:
    """R / (R - 1) ((R - 1) F G + (1 - F) (1 - G)), smallest where F = G = 1 / R.

    F is the share of boundaries, G the mean probability, of all tokens of the batch; R = ratio, the
    tokens a concept should have, above 1. Differentiable in probability.
    """
    if not ratio > 1:
        raise ValueError(f"ratio must be above 1, got {ratio}")
    live = torch.ones_like(boundary) if mask is None else mask
    count = live.sum().clamp(min=1)
    share = (boundary & live).sum() / count
    mean = probability.masked_fill(~live, 0).sum() / count
    return ratio / (ratio - 1) * ((ratio - 1) * share * mean + (1 - share) * (1 - mean))


METHOD = Method(
    title=("ConceptMoE: Adaptive Token-to-Concept Compression for Implicit Compute Allocation"),
    arxiv="2601.21420",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="run the tokens of one concept as one, and carry it on to them afterwards",
)
