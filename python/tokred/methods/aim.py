"""AIM: merge the tokens of every frame to a quarter, rank what is left by PageRank inside the LLM.

AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (arXiv 2412.03248).

Merged tokens are plain means, of means in the second step; sizes are not counted.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred
from tokred.schedule import resolve

from ._maps import identity
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video, frame_maps_in_a_row


def merge_frames(x: Tensor, shares: tuple[float, ...] = (0.5, 0.25)) -> VideoTokens:
    """Merges within every frame, by the similarity of its features, in several steps.

    Args:
        x: [B, F, N, C], the projected tokens that a language model would read.
        shares: int(N * share) tokens of a frame merge in each step, at most half of what is left;
            a half and a quarter leave a quarter.

    Returns:
        VideoTokens with tokens [B, F * M, C]; those of a frame that have not merged come first.

    Raises:
        ValueError: x is no video, or a share outside [0, 1).
    """
    batch, frames, tokens, _ = check_video(x)
    rows, total = x.flatten(0, 1).contiguous(), None
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(f"shares must be in [0, 1), got {share}")
        r = resolve(int(tokens * share), rows.shape[1], 0)
        if r == 0:
            continue
        token_map = tokred.bipartite_soft_matching(rows.detach(), r)
        rows, _ = tokred.merge(rows, token_map, rows.shape[1] - r, mode="plain_mean")
        total = token_map if total is None else tokred.compose(token_map, total)
    left = rows.shape[1]
    total = identity(rows) if total is None else total
    return VideoTokens(
        rows.reshape(batch, frames * left, -1), frame_maps_in_a_row(total, left, frames)
    )


def importance(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    causal: bool = True,
    iterations: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """How important every token is to the others in a layer of the language model.

    PageRank without damping on the attention of every head, its logits divided by the temperature;
    the root of the sum over heads of the squares is the published score up to a constant factor.

    Args:
        q: [B, H, N, D]. k: [B, Hkv, N, D]. scale: of the logits, 1 / sqrt(D) where None.

    Returns:
        f32 [B, N], the root of the mean over the heads of the squares.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ranks = tokred.pagerank(q, k, iterations, scale=scale / temperature, causal=causal)
    return ranks.square().mean(1).sqrt()


def keep_rate(layer: int, first: int = 13, step: float = 0.125) -> float:
    """The share of the image's tokens that a layer of the language model keeps.

    1 up to layer `first`, then by `step` less from layer to layer, down to 0.
    """
    return min(1.0, max(0.0, 1.0 - step * (layer - first)))


def keep(scores: Tensor, rate: float, protected: Tensor, present: Tensor | None = None) -> Tensor:
    """bool [B, N]: the tokens that stay in a layer.

    Args:
        scores: f32 [B, N], importance. rate: keep_rate; int(rate * V) of the V tokens that are not
            protected stay, those of the highest scores.
        protected: bool [B | 1, N], those that stay in any case, such as text.
        present: bool [B, N], those that earlier layers have kept; all where None.
    """
    protected = protected.expand_as(scores)
    may = ~protected if present is None else ~protected & present
    budget = ((~protected).sum(1).double() * rate).to(torch.int32)
    ranked = scores.masked_fill(~may, -torch.inf)
    _, chosen = tokred.topk(ranked, scores.shape[1], row_k=budget)
    place = torch.where(chosen >= 0, chosen, scores.shape[1]).long()
    spare = torch.cat([protected, protected[:, :1]], 1)
    return spare.scatter(1, place, True)[:, :-1]


METHOD = Method(
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    arxiv="2412.03248",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="merge the tokens of every frame to a quarter, keep fewer from layer to layer after it",
)
