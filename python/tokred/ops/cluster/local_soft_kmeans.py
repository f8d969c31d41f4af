"""Soft clusters of a grid of tokens: wrapper, fake kernel and flop count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def local_soft_kmeans(
    x: Tensor,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    iterations: int = 5,
    temperature: float = 0.05,
    window: int = 7,
) -> tuple[Tensor, Tensor]:
    """Soft k-means of a grid of tokens in which every token sees the centroids around it only.

    Token clustering of Expediting ViT (arXiv:2210.01035), after superpixel sampling networks:
    centroids start as the means of an adaptive pooling to h by w. An iteration weighs the centroids
    at most window // 2 cells from a token's own, softmax of -temperature times the squared
    distance, and moves every centroid to the mean of its tokens by weight. Tokens by clusters never
    exist in memory; weights of the window do, window^2 numbers a token.

    Args:
        x: [B, H * W, C] float32, float16 or bfloat16, row by row, channels contiguous.
        grid: (H, W).
        clusters: (h, w), at most (H, W).
        iterations: between 0 and 100000.
        temperature: at least 0; 0 weighs all centroids of the window alike.
        window: odd, between 1 and 255; cells of centroids along a side.

    Returns:
        centroids float32 [B, h * w, C], and assignment int32 [B, H * W], the nearest of all
        centroids, the lowest of equals. A token with a number that is not finite has assignment -1
        and no weight; a centroid without weight stays where it was. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 5 B H W window^2 C flops an iteration, and 2 B H W h w C for the assignment.
    """
    return choose(
        _ops.local_soft_kmeans.default, x, grid, clusters, iterations, temperature, window
    )


@torch.library.register_fake("tokred::local_soft_kmeans")
def _local_soft_kmeans_fake(
    x: Tensor,
    grid: Sequence[int],
    clusters: Sequence[int],
    iterations: int = 5,
    temperature: float = 0.05,
    window: int = 7,
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, H * W, C], got {x.dim()}-D")
    torch._check(len(clusters) == 2, lambda: "clusters must be two numbers, h and w")
    batch, tokens, channels = x.shape
    centroids = x.new_empty((batch, clusters[0] * clusters[1], channels), dtype=torch.float32)
    return centroids, x.new_empty((batch, tokens), dtype=torch.int32)


not_differentiable("local_soft_kmeans")
sharded("local_soft_kmeans", "x bnc -> bmc, bn")


@register_flop_formula(_ops.local_soft_kmeans)
def _local_soft_kmeans_flops(
    x: Any,
    grid: Any,
    clusters: Any,
    iterations: Any = 5,
    temperature: Any = 0.05,
    window: Any = 7,
    **kwargs: Any,
) -> int:
    batch, tokens, channels = x
    pairs = min(window, clusters[0]) * min(window, clusters[1])
    return batch * tokens * channels * (5 * pairs * iterations + 2 * clusters[0] * clusters[1])
