"""CoViPAL: a small module that has seen image and text scores visual tokens before a layer.

CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models (arXiv
2508.17243).

The module is learned: its scores are an argument, and what it is taught is `attention_target`. An
approximate version: how attention is summed into what is taught follows a description.
"""

from __future__ import annotations

from torch import Tensor

from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, mask_of
from ._prompts import attention_from, best_share


def covipal(
    scores: Tensor,
    ratio: float = 0.25,
    keep: int | None = None,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """The visual tokens of highest score: int(ratio * N) of them.

    Args:
        scores: [B, N], of the module, before a layer.
        ratio: the share that stays, in [0, 1]. keep: their number, in place of ratio.
        valid: bool [B, N]; of a row with padding int(ratio * its tokens) stay.
        order: "position" or "score".

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: a ratio outside [0, 1], keep below 0, or another order.
    """
    return best_share(scores, ratio, keep, valid, order)


def attention_target(
    q: Tensor,
    k: Tensor,
    text: Tensor,
    num_chosen: int,
    visual: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What the module is taught: 1 for the visual tokens that a deep layer's text attends to most.

    Args:
        q: [B, Hq, L, D], k: [B, Hkv, L, D], of that layer, causal.
        text: bool [B, L], the queries; visual: bool [B, L], the tokens that are scored.
        num_chosen: how many of a row are 1. scale: 1 / sqrt(D) where None.
        mask: bool [B, L], False for padding.

    Returns:
        f32 [B, L].
    """
    check_count("num_chosen", num_chosen)
    scores = attention_from(text, q, k, scale, mask)
    chosen = best(scores, num_chosen, visual if mask is None else visual & mask)
    return mask_of(chosen, visual.shape[1]).float()


METHOD = Method(
    title=(
        "CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models"
    ),
    arxiv="2508.17243",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.TRAINING),
    status="approximate",
    summary="keep the visual tokens that a small learned module scores highest before a layer",
)
