"""TTF-VLA: reuse visual tokens of the last frame where pixels and relevance allow it.

TTF-VLA: Temporal Token Fusion via Pixel-Attention Integration for Vision-Language-Action Models
(arXiv 2508.19257).

The encoder runs on every frame, so that no work is saved; what is fused is less noisy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs
from ._picks import best, mask_of

_GREY = (0.299, 0.587, 0.114)


def pixel_difference(pixels: Tensor, previous: Tensor, patch: int = 14) -> Tensor:
    """The mean difference of grey values in every patch.

    Args:
        pixels, previous: [B, 3, H, W], two frames, normalised as for the encoder.

    Returns:
        f32 [B, (H // patch) * (W // patch)].

    Raises:
        ValueError: frames of different shapes, or without three channels.
    """
    if pixels.shape != previous.shape or pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(
            "pixels and previous must be [B, 3, H, W], got "
            f"{list(pixels.shape)} and {list(previous.shape)}"
        )
    weights = torch.tensor(_GREY, device=pixels.device)[:, None, None]
    grey = ((pixels.float() * weights).sum(1) - (previous.float() * weights).sum(1)).abs()
    return functional.avg_pool2d(grey[:, None], patch).flatten(1)


def text_relevance(q: Tensor, k: Tensor, vision: slice, scale: float | None = None) -> Tensor:
    """How much the text attends to every visual token, in a layer of the step before.

    Args:
        q: [B, H, T, D], the queries of the text. k: [B, Hkv, N, D], all keys up to the last of
            these queries, which sees as many as there are; vision: those of the visual tokens.

    Returns:
        f32 [B, V], the mean over heads and queries.
    """
    columns = tokred.attention_columns(q, k, reduce="mean", causal=True, scale=scale)
    return columns.mean(1)[:, vision]


def recompute(
    difference: Tensor,
    relevance: Tensor | None = None,
    threshold: float = 0.1,
    keep: int = 120,
    keyframe: bool = False,
) -> Tensor:
    """The tokens that are taken from the new frame.

    Args:
        difference: f32 [B, V], pixel_difference; a patch above the threshold moves.
        relevance: f32 [B, V], of the step before; the `keep` highest are taken too.
        keyframe: all are taken; every fifth frame in the paper.

    Returns:
        bool [B, V].
    """
    check_minimum(0, keep=keep)
    moves = ~(difference <= threshold)  # what is not a number has to be looked at
    if keyframe:
        return torch.ones_like(moves)
    if relevance is None:
        return moves
    return moves | mask_of(best(relevance, min(keep, relevance.shape[1])), moves.shape[1])


def fuse(tokens: Tensor, cached: Tensor, fresh: Tensor) -> Tensor:
    """[B, V, C]: the new frame's tokens where bool [B, V] fresh says so, elsewhere the cached ones.

    What is returned is what the next frame takes as cached.
    """
    return torch.where(fresh[..., None], tokens, cached)


METHOD = Method(
    title=(
        "TTF-VLA: Temporal Token Fusion via Pixel-Attention Integration for "
        "Vision-Language-Action Models"
    ),
    arxiv="2508.19257",
    family=Family.REUSE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="reuse visual tokens of the last frame where pixels and relevance allow it",
)
