"""k-medoids of every item of a batch: wrapper, fake kernel and flop count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def kmedoids(
    x: Tensor,
    num_clusters: int,
    iterations: int = 100,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    """k-medoids of the tokens of every item, as CenterCLIP (arXiv:2205.00823) groups video tokens.

    A round gives every token to its nearest medoid (the lowest of equals), and makes the member of
    the smallest sum of distances to all members of its cluster the medoid (the lowest of equals).
    An item ends after `iterations` rounds, or when its medoids stay, whatever the rest of the batch
    does; CenterCLIP's release looks at the mean over a batch. The assignment returned is the one to
    the medoids returned. Neither tokens by tokens nor clusters by tokens by tokens exist in memory.

    Args:
        x: [B, N, C] float32, float16 or bfloat16, channels contiguous.
        num_clusters: K, at least 0; may exceed N.
        iterations: rounds at most, up to 100000; with 0 tokens are only given to the start.
        start: int32 [B, K] numbers of tokens; one that is out of range, masked, not finite, or
            there already makes no cluster. None is KKZ: the longest token, then always the one that
            is furthest from its nearest medoid (`greedy_select` with first="norm").
        mask: bool [B, N]; False takes a token out.
        metric: "l2", distances |a - b|, or "cosine", 1 - cos(a, b).

    Returns:
        medoids int32 [B, K], numbers of tokens, ascending, with -1 behind them for each cluster
        that there is not; and assignment int32 [B, N], places in medoids, usable as a token map.
        Masked tokens, and tokens with a number that is not finite or too large for float32
        products, have assignment -1. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B N K C flops a round, and 3 C for every pair of a cluster: 3 B N^2 C / K where
    clusters are of one size. O(B (N + K C)) numbers of workspace.
    """
    return choose(_ops.kmedoids.default, x, num_clusters, iterations, start, mask, metric)


@torch.library.register_fake("tokred::kmedoids")
def _kmedoids_fake(
    x: Tensor,
    num_clusters: int,
    iterations: int = 100,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "l2",
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    torch._check(num_clusters >= 0, lambda: f"num_clusters must be at least 0, got {num_clusters}")
    batch, tokens, _ = x.shape
    medoids = x.new_empty((batch, num_clusters), dtype=torch.int32)
    return medoids, x.new_empty((batch, tokens), dtype=torch.int32)


not_differentiable("kmedoids")
sharded("kmedoids", "x bnc, start bk, mask bn -> bk, bn")


@register_flop_formula(_ops.kmedoids)
def _kmedoids_flops(
    x: Any, num_clusters: Any, iterations: Any = 100, *args: Any, **kwargs: Any
) -> int:
    """The assignments of all rounds; an item may end sooner."""
    batch, tokens, channels = x
    return 2 * batch * tokens * num_clusters * channels * (iterations + 1)
