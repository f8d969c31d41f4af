"""Runs of consecutive tokens that are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._library import check_tensor
from ..placements import sharded
from ..registration import call, promote_under_autocast, without_gradient
from .folded import fold_table, fold_tokens

_ops = torch.ops.tokred


@dataclass(frozen=True)
class AdjacentRuns:
    """What `adjacent_runs` returns.

    ids: int32 [..., N], the run of each token, ascending; -1 for masked tokens. A token map.
    start, length: int32 [..., N], first token and number of tokens of run r, -1 from count on.
    count: int32 [...], runs.
    cosine: float32 [..., N], each token's similarity to the one before it.
    """

    ids: Tensor
    start: Tensor
    length: Tensor
    count: Tensor
    cosine: Tensor


def adjacent_runs(
    x: Tensor,
    threshold: float,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    max_length: int = 0,
    num_sinks: int = 0,
    num_locals: int = 0,
) -> AdjacentRuns:
    """Cuts tokens into maximal runs of neighbours whose cosine is at least a threshold.

    cosine[t] = cos(x[t-1], y[t]), 0 at t = 0 and where t or t - 1 is masked. Token t joins the run
    of t - 1 where cosine[t] >= threshold, so NaN joins nothing. KVMerger's merging sets
    (arXiv:2407.08454), with `segment_pool` and the ids; with two projections x and y the boundaries
    of H-Net (arXiv:2507.07955), which are where cosine < 0 for a threshold of 0.

    Args:
        x: [..., N, C] float32, float16 or bfloat16, channels contiguous. The leading dimensions,
            any number of them, must fold into one without a copy.
        threshold: any number but NaN; runs of one token above 1.
        y: [..., N, C], dtype and device of x; x itself where None.
        mask: bool [..., N]; a token with False is in no run, and ends the one before it.
        max_length: the maximum length of a run, where positive; longer ones are cut, counted from
            their start.
        num_sinks, num_locals: so many of the first and of the last unmasked tokens are runs of
            their own.

    Returns:
        AdjacentRuns: ids, start and length int32 [..., N], count int32 [...], cosine float32
        [..., N]. The ids of run r are segments for `segment_pool` with num_segments = N, or fewer.
        Under autocast x and y are cast to the wider dtype of the two.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: leading dimensions that do not fold, or an input requires grad.

    Complexity: 6 N C flops and two reads of x per row, one of them from the cache.
    """
    check_tensor("x", x)
    tokens = fold_tokens(x, "x")
    if y is not None:
        check_tensor("y", y)
        y = fold_tokens(y, "y")
    if mask is not None:
        mask = fold_table(mask, "mask", x.shape[:-1])
    ids, start, length, count, cosine = call(
        _ops.adjacent_runs.default, tokens, threshold, y, mask, max_length, num_sinks, num_locals
    )
    if x.dim() == 3:
        return AdjacentRuns(ids, start, length, count, cosine)
    ids, start, length, cosine = (t.view(x.shape[:-1]) for t in (ids, start, length, cosine))
    return AdjacentRuns(ids, start, length, count.view(x.shape[:-2]), cosine)


@torch.library.register_fake("tokred::adjacent_runs")
def _adjacent_runs_fake(
    x: Tensor,
    threshold: float,
    y: Tensor | None = None,
    mask: Tensor | None = None,
    max_length: int = 0,
    num_sinks: int = 0,
    num_locals: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    shape = x.shape[:2]
    ids, start, length = (x.new_empty(shape, dtype=torch.int32) for _ in range(3))
    count = x.new_empty(shape[:1], dtype=torch.int32)
    return ids, start, length, count, x.new_empty(shape, dtype=torch.float32)


without_gradient("adjacent_runs")
promote_under_autocast("adjacent_runs", "x", "y")
sharded("adjacent_runs", "x bnc, y bnc, mask bn -> bn, bn, bn, b, bn")
