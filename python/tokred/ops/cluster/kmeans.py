"""k-means of every item of a batch: wrapper, fake kernel and flop count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def kmeans(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's k-means of the tokens of every item; tokens by clusters never exist in memory.

    A round gives every token to its nearest centroid (the lowest of equals) and moves every
    centroid to the mean of its tokens; one without tokens stays where it was. An item ends after
    `iterations` rounds, or when none of its centroids has moved by more than the tolerance,
    whatever the rest of the batch does. The assignment returned is the one to the centroids
    returned.

    "cosine" is spherical k-means: tokens and centroids have length 1 (a zero row stays zero), and
    the nearest centroid is the one of the largest cosine. "l2" compares x . c - |c|^2 / 2 in
    float32, whose rounding is relative to |x| |c|: tokens that lie far from 0 and close together
    should be centred first.

    Nothing is random. Other starts than the default: `greedy_select` with first="norm" picks tokens
    far from each other (KKZ), or several random starts can be tried as items of one batch.
    For a gradient, pool with the assignment as a token map: `merge(x, assignment, num_clusters)`.

    Args:
        x: [B, N, C] float32, float16 or bfloat16, channels contiguous.
        num_clusters: K, at least 0; may exceed N.
        iterations: rounds at most, up to 100000; with 0 tokens are only given to the start.
        start: int32 [B, K] numbers of tokens, where -1 or any other number out of range, or a
            masked token, makes a cluster that stays empty, its centroid 0; or float32 [B, K, C]
            centroids. None spreads the start evenly over the n unmasked tokens: centroid k is the
            one of rank floor((2 k + 1) n / (2 K)).
        mask: bool [B, N]; False takes a token out.
        metric: "l2" or "cosine".
        tolerance: a distance, at least 0.

    Returns:
        centroids float32 [B, K, C], assignment int32 [B, N], and counts int32 [B, K], the tokens of
        every cluster. Masked tokens, and tokens with a number that is not finite or too large for
        float32 products, have assignment -1. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B N K C flops a round, O(B (N + K) C) memory traffic; at most N C / 8 + K C
    numbers of workspace an item.
    """
    return choose(_ops.kmeans.default, x, num_clusters, iterations, start, mask, metric, tolerance)


@torch.library.register_fake("tokred::kmeans")
def _kmeans_fake(
    x: Tensor,
    num_clusters: int,
    iterations: int = 10,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    torch._check(num_clusters >= 0, lambda: f"num_clusters must be at least 0, got {num_clusters}")
    batch, tokens, channels = x.shape
    return (
        x.new_empty((batch, num_clusters, channels), dtype=torch.float32),
        x.new_empty((batch, tokens), dtype=torch.int32),
        x.new_empty((batch, num_clusters), dtype=torch.int32),
    )


not_differentiable("kmeans")
sharded("kmeans", "x bnc, start bk, mask bn -> bkc, bn, bk")


@register_flop_formula(_ops.kmeans)
def _kmeans_flops(
    x: Any, num_clusters: Any, iterations: Any = 10, *args: Any, **kwargs: Any
) -> int:
    """Flops of all rounds and the last assignment; an item may end sooner."""
    batch, tokens, channels = x
    return 2 * batch * tokens * num_clusters * channels * (iterations + 1)
