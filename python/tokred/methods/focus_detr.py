"""Focus-DETR: every encoder layer updates fewer of the tokens, and puts them back among the others.

Less is More: Focus Attention for Efficient DETR (arXiv 2307.12612).

An approximate version: the foreground scores, which are learned, are an argument. How many tokens a
layer updates follows from each image alone; a maintained re-implementation takes the largest image
of a batch for all. There padding has the lowest score, here it is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._budgets import keep_count
from ._method import Family, Method, Needs
from ._picks import best
from ._skipping import run_on

SHARES = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)


def foreground_counts(valid: Tensor, ratio: float, share: float) -> Tensor:
    """int64 [B]: how many tokens of every image a layer updates, int(share * (int(ratio V) + 1)).

    Args:
        valid: bool [B, N], V of which are no padding; at most V are updated.
        ratio: the share of foreground, 0.5 in the paper. share: of the layer, as in SHARES.
    """
    real = valid.sum(1)
    foreground = (real.double() * ratio + 1e-9).floor() + 1
    return torch.minimum((foreground * share + 1e-9).floor().long(), real)


def focus_encoder(
    x: Tensor,
    scores: Tensor,
    layers: Sequence[Callable[[Tensor, Tensor], Tensor]],
    valid: Tensor | None = None,
    ratio: float = 0.5,
    shares: Sequence[float] = SHARES,
) -> Tensor:
    """Runs encoder layers, each on the tokens of the highest scores.

    Args:
        x: [B, N, C], the tokens of all feature levels.
        scores: f32 [B, N], how much each is foreground.
        layers: each (queries [B, K, C], indices i32 [B, K]) -> [B, K, C], such as deformable
            attention; -1 in indices, beside zeros in queries, is none.
        valid: bool [B, N], False is padding, which is never updated.
        ratio, shares: see foreground_counts; a share for each layer.

    Returns:
        [B, N, C]; differentiable.

    Raises:
        ValueError: other than one share a layer, or a share or ratio outside [0, 1].
    """
    if len(shares) != len(layers):
        raise ValueError(
            f"shares must have one for each of {len(layers)} layers, got {len(shares)}"
        )
    batch, tokens, _ = x.shape
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
    most = min(keep_count(tokens, ratio=ratio) + 1, tokens)
    for layer, share in zip(layers, shares, strict=True):
        width = keep_count(most, ratio=share)
        chosen = best(scores, foreground_counts(valid, ratio, share), valid, "score")[:, :width]
        chosen = chosen.contiguous()
        x = run_on(x, chosen, layer)
    return x


METHOD = Method(
    title="Less is More: Focus Attention for Efficient DETR",
    arxiv="2307.12612",
    family=Family.PRUNE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="approximate",
    summary="each encoder layer updates the tokens of highest foreground score alone",
)
