"""Scores of keys and of blocks of keys: wrappers, fake kernels and flop counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor
from ..placements import sharded
from ..registration import call, cast_under_autocast, without_gradient
from ..symbolic import check_dim

_ops = torch.ops.tokred


def qk_score(
    q: Tensor,
    k: Tensor,
    reduce: str = "none",
    dims: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """How much the query, or the mean of a few queries, cares about every key: one read of k.

    s[h, t] = scale * mean over the queries i of q[h, i] . k[h // (Hq // Hkv), t], and over the
    heads

    ============== ==========================================================================
    "none"         s itself, [B, Hq, N]
    "group_mean"   mean over the query heads of a key head, [B, Hkv, N]: Kinetics
    "group_max"    their maximum, [B, Hkv, N]
    "head_mean"    mean over all heads, [B, 1, N]: PromptDistill (arXiv:2503.23274)
    "softmax_vote" softmax over the keys for each head, summed over the heads, [B, 1, N]:
                   TokenSelect (arXiv:2411.02886), with scale 1
    ============== ==========================================================================

    A key at or after the row's length, masked, or whose slot lies outside [0, S), scores -inf in
    every head (0 as a vote).

    Args:
        q: [B, Hq, D] or [B, Hq, L, D] float32, float16 or bfloat16, the last dimension contiguous,
            D at most 256.
        k: [B, Hkv, N, D], Hq a multiple of Hkv; with slots, [1, Hkv, S, D].
        reduce: one of the table.
        dims: int32 [Hq, F], the dimensions that each head's score reads, for FASA's dominant
            frequencies; those outside [0, D) are skipped, and one listed twice counts twice.
        scale: 1 / sqrt(D) where None.
        lengths: int32 [B], keys of each row that exist.
        mask: bool [B | 1, N]; True is visible.
        slots: int32 [B, N], where each row's keys are in a pool that all rows share (pages).

    Returns:
        float32 [B, Hq | Hkv | 1, N]. Under autocast q and k are cast, as for attention.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad: scores serve to choose, and have no gradient.

    Complexity: 2 B Hq N D flops (F in place of D with dims), one read of k.
    """
    check_tensor("q", q)
    if q.dim() == 3:
        q = q[:, :, None]
    return call(_ops.qk_score.default, q, k, reduce, dims, scale, lengths, mask, slots)


def block_pool(
    x: Tensor,
    block_size: int = 0,
    statistic: str = "mean",
    boundaries: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summarises blocks of tokens, usually of keys, for `block_score`.

    =================== ==========================================================================
    "mean"              the mean of the visible tokens; a key's logit of it is the mean of their
                        logits, as in Kinetics
    "sqrt_mean"         mean * sqrt(count), after DHSA's chunks of unequal length
    "min_max"           elementwise minimum and maximum: Quest (arXiv:2406.10774)
    "mean_deviation"    mean, and elementwise mean absolute deviation: Rectified SpaAttn
                        (arXiv:2511.19835)
    =================== ==========================================================================

    Args:
        x: [B, H, N, D] float32, float16 or bfloat16, the last dimension contiguous.
        block_size: tokens of a block, the last one may be shorter; 0 beside boundaries.
        statistic: one of the table.
        boundaries: int32 [B | 1, M + 1]; block m is [boundaries[m], boundaries[m + 1]) clamped to
            [0, N), and empty where these do not ascend.
        lengths: int32 [B], tokens of each row that exist.
        mask: bool [B | 1, N]; False takes the token out of its block.

    Returns:
        pooled float32 [B, H, M, S, D] with S = 2 for min_max (min first) and mean_deviation
        (mean first), else 1; and counts int32 [B, M], the visible tokens. An empty block is 0.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: x requires grad.

    Complexity: one read of x (two for mean_deviation).
    """
    return call(_ops.block_pool.default, x, block_size, statistic, boundaries, lengths, mask)


def block_score(
    q: Tensor,
    pooled: Tensor,
    counts: Tensor | None = None,
    rule: str = "dot",
    reduce: str = "none",
    scale: float | None = None,
) -> Tensor:
    """How much every query cares about every block of keys.

    =========== ================================================================================
    "dot"       q . block, for one statistic
    "bounds"    sum over d of max(q_d min_d, q_d max_d): an upper bound of the logits of the
                block's keys. Quest (arXiv:2406.10774), for min_max
    "deviation" |dq . k| + |q . dk| for q and blocks of mean_deviation: the error that pooling
                makes, as Rectified SpaAttn (arXiv:2511.19835) estimates it
    =========== ================================================================================

    Args:
        q: [B, Hq, L, D] float32, float16 or bfloat16, the last dimension contiguous; pooled
            queries float32 [B, Hq, L, 1, D], or [B, Hq, L, 2, D] for "deviation", as `block_pool`
            returns them.
        pooled: [B, Hkv, M, 1 | 2, D] from `block_pool` over the keys, Hq a multiple of Hkv.
        counts: int32 [B | 1, M]; a block whose count is not positive scores -inf (0 as a vote).
        rule: one of the table.
        reduce: over the heads, as in `qk_score`; softmax_vote normalises over the blocks.
        scale: 1 / sqrt(D) where None.

    Returns:
        float32 [B, Hq | Hkv | 1, L, M].

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Hq L M D flops (4 for "bounds" and "deviation").
    """
    check_tensor("q", q)
    if q.dim() == 5 and q.shape[3] == 1:
        q = q[:, :, :, 0]
    return call(_ops.block_score.default, q, pooled, counts, rule, reduce, scale)


def _reduced_heads(q: Tensor, k: Tensor, reduce: str) -> int:
    if reduce in ("group_mean", "group_max"):
        return k.shape[1]
    return 1 if reduce in ("head_mean", "softmax_vote") else q.shape[1]


@torch.library.register_fake("tokred::qk_score")
def _qk_score_fake(
    q: Tensor,
    k: Tensor,
    reduce: str = "none",
    dims: Tensor | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    torch._check(q.dim() == 4, lambda: f"q must be [B, Hq, L, D], got {q.dim()}-D")
    torch._check(k.dim() == 4, lambda: f"k must be [B, Hkv, N, D], got {k.dim()}-D")
    torch._check(k.shape[3] == q.shape[3], lambda: "k must have the head dimension of q")
    if slots is None:
        torch._check(k.shape[0] == q.shape[0], lambda: "k must have the batch size of q")
    else:
        check_dim("slots", slots, 2, "[B, N]")
    keys = k.shape[2] if slots is None else slots.shape[1]
    return q.new_empty((q.shape[0], _reduced_heads(q, k, reduce), keys), dtype=torch.float32)


@torch.library.register_fake("tokred::block_pool")
def _block_pool_fake(
    x: Tensor,
    block_size: int = 0,
    statistic: str = "mean",
    boundaries: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be [B, H, N, D], got {x.dim()}-D")
    batch, heads, tokens, head_dim = x.shape
    if boundaries is None:
        torch._check(block_size > 0, lambda: "block_size must be positive without boundaries")
        blocks = (tokens + block_size - 1) // block_size
    else:
        check_dim("boundaries", boundaries, 2, "[B | 1, M + 1]")
        blocks = boundaries.shape[1] - 1
    statistics = 2 if statistic in ("min_max", "mean_deviation") else 1
    pooled = x.new_empty((batch, heads, blocks, statistics, head_dim), dtype=torch.float32)
    return pooled, x.new_empty((batch, blocks), dtype=torch.int32)


@torch.library.register_fake("tokred::block_score")
def _block_score_fake(
    q: Tensor,
    pooled: Tensor,
    counts: Tensor | None = None,
    rule: str = "dot",
    reduce: str = "none",
    scale: float | None = None,
) -> Tensor:
    torch._check(q.dim() in (4, 5), lambda: f"q must be [B, Hq, L, D], got {q.dim()}-D")
    torch._check(pooled.dim() == 5, lambda: "pooled must be [B, Hkv, M, 1 | 2, D]")
    torch._check(pooled.shape[0] == q.shape[0], lambda: "pooled must have the batch size of q")
    heads = _reduced_heads(q, pooled, reduce)
    return q.new_empty((q.shape[0], heads, q.shape[2], pooled.shape[2]), dtype=torch.float32)


without_gradient("qk_score")
without_gradient("block_pool")
without_gradient("block_score")
cast_under_autocast("qk_score", "q", "k")
sharded("qk_score", "q bhld, k bhnd, dims hf, lengths b, mask bn, slots bn -> bhn")
sharded("block_pool", "x bhnd, boundaries bm, lengths b, mask bn -> bhmsd, bm")
sharded("block_score", "q bhl, pooled bhmsd, counts bm -> bhlm")


@register_flop_formula(_ops.qk_score)
def _qk_score_flops(
    q: Any,
    k: Any,
    reduce: Any = "none",
    dims: Any = None,
    scale: Any = None,
    lengths: Any = None,
    mask: Any = None,
    slots: Any = None,
    **kwargs: Any,
) -> int:
    """Tensors arrive as their shapes. The queries are averaged first."""
    batch, heads, _, head_dim = q
    keys = k[2] if slots is None else slots[1]
    return 2 * batch * heads * keys * (head_dim if dims is None else dims[1])


@register_flop_formula(_ops.block_score)
def _block_score_flops(q: Any, pooled: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries = q[:3]
    return 2 * batch * heads * queries * pooled[2] * pooled[3] * q[-1]
