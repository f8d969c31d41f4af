"""Clustering by density peaks: wrapper and fake kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def dpc_knn(
    x: Tensor, num_clusters: int, k: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Density-peaks clustering with k nearest neighbours (DPC-KNN).

    With D(i, j) = |x_i - x_j|^2 / C, a token's density is exp(-m), m the mean of its k smallest D,
    that to itself included, and delta the distance to its nearest denser token. The tokens of the
    largest density * delta are centres, and every token goes to its nearest centre. As in
    Chat-UniVi (arXiv:2311.08046), HoliTom (arXiv:2505.21334) and FlashVID, but without noise: equal
    densities rank by index, so that the result is the same every time, with duplicates too.
    Scores are compared as log delta - m, which does not underflow.

    Args:
        x: [B, N, C] float32, float16 or bfloat16, channels contiguous.
        num_clusters: M, at least 0; may exceed N.
        k: neighbours of a density, at least 1; N where it is more.
        mask: bool [B, N]; False is no neighbour, no centre, and has assignment -1. Tokens whose
            squared norm is not finite (NaN too) count as masked.

    Returns:
        centers int32 [B, M], by descending density * delta (ties: the lower index), -1 where there
        are fewer tokens. assignment int32 [B, N], the index in `centers` of the nearest centre, the
        first of equals, or of the token itself where it is one; a token map for `merge` and
        `segment_pool`. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: B N^2 C flops on the CPU where a thread has an item (each pair once), 4 B N^2 C on
        CUDA, and 2 B N M C for the assignment; memory O(N (C + k)), never N x N.
    """
    return choose(_ops.dpc_knn.default, x, num_clusters, k, mask)


@torch.library.register_fake("tokred::dpc_knn")
def _dpc_knn_fake(
    x: Tensor, num_clusters: int, k: int = 5, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    torch._check(num_clusters >= 0, lambda: "num_clusters must be at least 0")
    centers = x.new_empty((x.shape[0], num_clusters), dtype=torch.int32)
    return centers, x.new_empty((x.shape[0], x.shape[1]), dtype=torch.int32)


not_differentiable("dpc_knn")
sharded("dpc_knn", "x bnc, mask bn -> bm, bn")


@register_flop_formula(_ops.dpc_knn)
def _dpc_knn_flops(x: Any, num_clusters: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes; every pair of tokens once, and of a token and a centre."""
    batch, tokens, channels = x
    return batch * tokens * channels * (tokens + 2 * num_clusters)
