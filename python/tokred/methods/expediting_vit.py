"""Expediting ViT: cluster the grid of tokens inside a model, and rebuild the grid at its end.

Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning (arXiv
2210.01035).

A few layers run on all tokens, the next on `cluster`'s centroids, and `reconstruct` gives every
place of the grid a mixture of the centroids it was nearest to before, so that dense heads work
unchanged. The weights of the mixture are normalised by their Euclidean norm, as the authors' code
does and not the paper: norm="l1" makes them sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import tokred

from ._lists import check_count
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class Clustered:
    """The tokens that replace a grid of tokens.

    centroids: f32 [B, h * w, C], what the next layers run on, cast as they need. x: [B, H * W, C],
    the tokens they were made of. token_map: i32 [B, H * W], the nearest centroid of every token.
    """

    centroids: Tensor
    x: Tensor
    token_map: Tensor


def cluster(
    x: Tensor,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    iterations: int = 5,
    temperature: float = 0.05,
    window: int = 7,
) -> Clustered:
    """Soft k-means in which every token belongs to the centroids near its place.

    Args:
        x: [B, H * W, C], row by row, without a class token. grid: (H, W). clusters: (h, w).
        iterations, temperature, window: as in tokred.local_soft_kmeans.
    """
    centroids, assignment = tokred.local_soft_kmeans(
        x, grid, clusters, iterations, temperature, window
    )
    return Clustered(centroids, x, assignment)


def reconstruct(
    deep: Tensor,
    clustered: Clustered,
    k: int = 3,
    temperature: float = 0.05,
    norm: Literal["l1", "l2"] = "l2",
) -> Tensor:
    """The grid again: every token mixes what became of its k nearest centroids.

    Args:
        deep: [B, h * w, C2], the centroids after the layers between.
        k, temperature, norm: as in tokred.knn_reconstruct.

    Returns:
        [B, H * W, C2], differentiable in deep.
    """
    check_count("k", k)
    return tokred.knn_reconstruct(deep, clustered.x, clustered.centroids, k, temperature, norm)


METHOD = Method(
    title="Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning",
    arxiv="2210.01035",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER,),
    status="exact",
    summary="run deep layers on clusters of the grid, and rebuild the grid from them",
)
