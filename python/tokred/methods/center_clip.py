"""CenterCLIP: cluster the tokens of a segment of a video, and keep the medoids.

CenterCLIP: Token Clustering for Efficient Text-Video Retrieval (arXiv 2205.00823).

k-medoids++ from the start of Katsavounidis, Kuo and Zhang. Every segment stops by itself; in the
authors' code segments that run together stop together. Class tokens of a segment are averaged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs
from ._video import VideoTokens, check_video


def cluster_segments(
    x: Tensor,
    segments: int,
    clusters: int,
    num_prefix: int = 1,
    metric: Literal["l2", "cosine"] = "l2",
    means: bool = False,
    iterations: int = 100,
) -> VideoTokens:
    """Clusters the tokens of every segment of consecutive frames.

    Args:
        x: [B, F, N, C], with num_prefix class tokens a frame, which are averaged over the segment.
        segments: a divisor of F. clusters: tokens of a segment that are left beside the class
            tokens, at most F / segments * (N - num_prefix).
        means: keep the mean of every cluster in place of its medoid.
        metric, iterations: as in tokred.kmedoids.

    Returns:
        VideoTokens with tokens [B, segments, num_prefix + clusters, C], medoids in order of
        position; differentiable in x. Slots of one medoid less than clusters are zeros.

    Raises:
        ValueError: x is no video, or segments or clusters do not fit it.
    """
    batch, frames, tokens, channels = check_video(x)
    if segments < 1 or frames % segments:
        raise ValueError(f"segments must divide the {frames} frames of x, got {segments}")
    each = frames // segments
    patches = tokens - num_prefix
    if not 1 <= clusters <= each * patches:
        raise ValueError(f"clusters must be from 1 to {each * patches}, got {clusters}")
    rows = x.reshape(batch * segments, each, tokens, channels)
    first = rows[:, :, :num_prefix].mean(1)
    rest = rows[:, :, num_prefix:].flatten(1, 2).contiguous()
    medoids, assignment = tokred.kmedoids(rest.detach(), clusters, iterations, metric=metric)
    if means:
        kept, _ = tokred.merge(rest, assignment, clusters, mode="plain_mean")
    else:
        kept = tokred.unmerge(rest, medoids)
    done = torch.cat([first, kept], 1).unflatten(0, (batch, segments))
    place = torch.arange(num_prefix, dtype=torch.int32, device=x.device).expand(
        batch * segments, each, -1
    )
    slots = torch.where(assignment >= 0, assignment + num_prefix, -1).unflatten(1, (each, patches))
    slots = torch.cat([place, slots], 2).view(batch, segments, -1)
    offset = torch.arange(segments, dtype=torch.int32, device=x.device)[:, None] * done.shape[2]
    return VideoTokens(done, torch.where(slots >= 0, slots + offset, -1).flatten(1))


METHOD = Method(
    title="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
    arxiv="2205.00823",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="cluster the tokens of each segment of a video, and keep the medoids",
)
