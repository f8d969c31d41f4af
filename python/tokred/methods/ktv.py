"""KTV: keep the frames nearest to the centres of clusters, and of each its important, rare tokens.

KTV: Keyframes and Key Tokens Selection for Efficient Training-Free Video LLMs (arXiv 2602.03615).

An approximate version: k-means starts from the frame of largest norm and those farthest from what
it has, where the paper draws its starts at random with a fixed seed. Which keyframe gets how many
tokens is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import tokred

from ._lists import check_count
from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video


def keyframes(features: Tensor, count: int = 6, iterations: int = 100) -> Tensor:
    """The frame nearest to the centre of every cluster of frames.

    Args:
        features: [B, F, D], one vector a frame, such as DINOv2's class token.
        count: clusters, at most F.

    Returns:
        i32 [B, count], ascending.

    Raises:
        ValueError: count is not from 1 to F.
    """
    check_count("count", count, minimum=None)
    if not 1 <= count <= features.shape[1]:
        raise ValueError(f"count must be from 1 to {features.shape[1]}, got {count}")
    features = features.detach().contiguous()
    start = tokred.greedy_select(features, count, metric="l2", first="norm")
    centroids, assignment, _ = tokred.kmeans(features, count, iterations, start)
    distance = torch.cdist(centroids, features.float())
    # A frame of its own cluster, so that no frame represents two.
    member = assignment[:, None] == torch.arange(count, device=features.device)[:, None]
    distance = distance.masked_fill(~member, torch.inf)
    nearest = distance.argmin(2)
    empty = ~member.any(2)  # of duplicate frames: what its cluster started from
    return torch.where(empty, start.long(), nearest).sort(1).values.to(torch.int32)


def token_scores(x: Tensor, class_logits: Tensor, alpha: float = 0.2) -> Tensor:
    """alpha * importance + (1 - alpha) * (1 - redundancy), both between 0 and 1 in every frame.

    Args:
        x: [B, F, N, C], the tokens of the keyframes.
        class_logits: [B, F, N], the logits of the class token's query with every key; importance is
            they, redundancy the mean cosine of a token with the others of its frame.

    Returns:
        f32 [B, F, N].
    """
    check_video(x)
    rows = x.detach().flatten(0, 1).contiguous()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    redundancy = tokred.similarity_stats(rows, exclude_self=True).mean.view(x.shape[:3])
    important = _between_0_and_1(class_logits.detach().float())
    return alpha * important + (1 - alpha) * (1 - _between_0_and_1(redundancy))


def _between_0_and_1(values: Tensor) -> Tensor:
    smallest, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - smallest) / (largest - smallest).clamp(min=1e-12)


def select_tokens(x: Tensor, scores: Tensor, budgets: Sequence[int]) -> VideoTokens:
    """The tokens of highest score of every keyframe, in their order.

    Args:
        x: [B, F, N, C], the tokens of the keyframes. scores: f32 [B, F, N].
        budgets: how many each of the F frames keeps, such as 576, 288, 288, 288, 288, 144.

    Returns:
        VideoTokens with tokens [B, sum of budgets, C].

    Raises:
        ValueError: another number of budgets, or one that is not from 0 to N.
    """
    batch, frames, tokens, _ = check_video(x)
    if len(budgets) != frames or any(not 0 <= budget <= tokens for budget in budgets):
        raise ValueError(
            f"budgets must be {frames} numbers from 0 to {tokens}, got {list(budgets)}"
        )
    most = torch.tensor(budgets, dtype=torch.int32, device=x.device).expand(batch, -1)
    places = max(budgets, default=0)
    _, chosen = tokred.topk(scores, places, order="position", row_k=most.contiguous())
    keep = torch.zeros(batch, frames, tokens + 1, dtype=torch.bool, device=x.device)
    keep = keep.scatter(2, torch.where(chosen >= 0, chosen, tokens).long(), True)[..., :tokens]
    keep = keep.flatten(1)
    token_map = torch.where(keep, keep.cumsum(1) - 1, -1).to(torch.int32)
    positions, _ = tokred.compact(keep, capacity=sum(budgets))
    return VideoTokens(tokred.unmerge(x.flatten(1, 2).contiguous(), positions), token_map)


METHOD = Method(
    title="KTV: Keyframes and Key Tokens Selection for Efficient Training-Free Video LLMs",
    arxiv="2602.03615",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="keep keyframes by clustering, and of each the tokens that are important and rare",
)
