"""Explainability-guided compression: keep the visual tokens of most relevance to the answer.

Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective
(arXiv 2506.01097).

A small convolutional network, which is learned, predicts the relevance from the attention of the
first layer: its scores are an argument. `relevance` is what it is taught. An approximate version:
the paper names explainability methods; the rule here, gradient-weighted attention roll-out, is one
of those it may mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._method import Family, Method, Needs
from ._prompts import best_share

ROWS = 256  # of an attention matrix, that are weighed at a time


def relevance(
    attention: Sequence[Tensor], gradient: Sequence[Tensor], target: int | Tensor = -1
) -> Tensor:
    """How much every token of the prompt contributes to one: the target's row of the roll-out.

    The roll-out is the product, from the last layer to the first, of I + mean over heads of the
    positive part of attention * gradient; its row needs a vector for each layer, no matrix.

    Args:
        attention: of every layer, [B, H, N, N], as a model returns it. gradient: of what the answer
            is judged by, in these.
        target: the token whose row it is, -1 the last; or integers [B].

    Returns:
        f32 [B, N].

    Raises:
        ValueError: none or not as many gradients, of other shapes, or a target outside.

    Complexity: one read of both, memory for some of the rows.
    """
    if not attention or len(attention) != len(gradient):
        raise ValueError(
            f"gradient must have one tensor for each of the layers of attention, at least one, got "
            f"{len(gradient)} for {len(attention)}"
        )
    batch, _, _, tokens = attention[-1].shape
    for weights, slope in zip(attention, gradient, strict=True):
        if weights.shape != slope.shape or [*weights.shape[2:]] != [tokens, tokens]:
            raise ValueError(
                f"attention and gradient must be [B, H, {tokens}, {tokens}], got "
                f"{[*weights.shape]} and {[*slope.shape]}"
            )
    if isinstance(target, int):
        if not -tokens <= target < tokens:
            raise ValueError(f"target must be one of {tokens} tokens, got {target}")
        target = torch.full((batch,), target % tokens, device=attention[-1].device)
    row = torch.zeros(batch, tokens, device=attention[-1].device)
    row.scatter_(1, target.long()[:, None], 1)
    for weights, slope in zip(reversed(attention), reversed(gradient), strict=True):
        added = torch.zeros_like(row)
        for first in range(0, tokens, ROWS):
            rows = slice(first, first + ROWS)
            part = weights[:, :, rows].detach().float() * slope[:, :, rows].detach().float()
            added += torch.einsum("bi,bij->bj", row[:, rows], part.clamp(min=0).mean(1))
        row = row + added
    return row


def explain_compressor(
    scores: Tensor,
    ratio: float = 0.5,
    keep: int | None = None,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """The visual tokens of highest relevance, which the language model is given.

    Args:
        scores: [B, N], relevance at the visual tokens, or the network's prediction of it.
        ratio: the share that stays, in [0, 1]. keep: their number, in place of ratio.
        valid: bool [B, N]; of a row with padding int(ratio * its tokens) stay.
        order: "position" or "score".

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: a ratio outside [0, 1], keep below 0, or another order.
    """
    return best_share(scores, ratio, keep, valid, order)


METHOD = Method(
    title=(
        "Generic Token Compression in Multimodal Large Language Models from an Explainability "
        "Perspective"
    ),
    arxiv="2506.01097",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="before the language model keep the visual tokens of most relevance to the answer",
)
