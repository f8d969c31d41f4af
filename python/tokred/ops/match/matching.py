"""match and the token maps made of it: wrappers, fake kernels and flop counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..._library import check_tensor
from ..placements import sharded
from ..registration import choose, not_differentiable, promote_under_autocast
from ..symbolic import larger, smaller

__all__ = ["bipartite_soft_matching", "match", "num_out", "threshold_matching"]

_ops = torch.ops.tokred


def match(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    weight_a: Tensor | None = None,
    weight_b: Tensor | None = None,
    metric: str = "cosine",
    band: int = -1,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """The best partner in b of every row of a, or the k best, without the similarity matrix.

    score[i] = max over j of weight_a[i] * weight_b[j] * metric(a_i, b_j), and index[i] is the
    lowest such j. Only pairs with both masks True and |i - j| <= band take part. A NaN score never
    wins. A row with no partner has score -inf and index -1.

    With k > 1 the k best partners of a row come in descending order, the lowest index first among
    equals, then (-inf, -1).

    The multiplicative weights are those of MCTF (arXiv:2403.10030), the band that of local merging;
    rows are normalised in float32 with norms of at least 1e-12, so a zero row has cosine 0.

    Args:
        a: [B, Na, C] float32, float16 or bfloat16, channels contiguous.
        b: [B, Nb, C], dtype and device of a.
        mask_a, mask_b: bool [B, Na] and [B, Nb]; False takes the row out.
        weight_a, weight_b: float32 [B, Na] and [B, Nb].
        metric: "cosine", "dot", "l2" (negated squared distance) or "half_cosine"
            ((1 + cosine) / 2, never negative, so that weights keep its order).
        band: the largest |i - j|; -1 for no limit.
        k: how many partners, at least 1; may exceed Nb.

    Returns:
        score float32 [B, Na] and index int32 [B, Na], or [B, Na, k] where k > 1. Not
        differentiable: they never require grad. Under autocast a and b are cast to the wider dtype
        of the two.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B Na Nb C flops in one pass, O(B (Na + Nb) C) memory traffic. With k > 1 an
        insertion into a sorted list for every partner that is among the k best so far: for rows in
        random order about k log(Nb / k) of them.
    """
    return choose(_ops.match.default, a, b, mask_a, mask_b, weight_a, weight_b, metric, band, k)


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> Tensor:
    """ToMe's bipartite soft matching (arXiv:2210.09461): the map that merges r tokens into others.

    Every source is linked to its most similar destination (cosine, lowest index on a tie); the r
    strongest links (lowest source on a tie) merge. By default the tokens after the prefix alternate
    by absolute position: even ones are sources, odd ones destinations. So num_prefix=1 is ToMe's
    class_token and 2 its distill_token. tomesd (arXiv:2303.17604) passes its own `destinations`.

    r is clamped to (N - num_prefix) // 2, or to the number of explicit sources; `num_out` gives the
    number of slots. Masked sources leave after all the matched ones, to -1 (dropped). Where fewer
    than r sources can merge (wrong positions in `sources`), the last slots are dropped.

    Args:
        metric: [B, N, C] float32, float16 or bfloat16, channels contiguous; usually the keys
            averaged over the heads.
        r: how many tokens leave, at least 0.
        num_prefix: leading tokens that take no part.
        mask: bool [B, N]; False is neither source nor destination.
        order: "tome": prefix, tokens on neither side, surviving sources (ascending with a prefix,
            else by descending similarity), destinations. "position": by the first member's
            position.
        sources, destinations: int32 [n] or [B | 1, n] of positions; those outside [0, N), repeated,
            in the prefix or on both sides are no sources. With only `destinations`, all other
            tokens after the prefix are sources; destinations should then be distinct.

    Returns:
        token_map int32 [B, N]: the output slot of every token, -1 where it is dropped. Not
        differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: 2 B Ns Nd C flops (B N^2 C / 2 by default), then O(N) per item.
    """
    sources, destinations = _sides(metric, num_prefix, sources, destinations)
    return choose(
        _ops.bipartite_soft_matching.default,
        metric,
        r,
        num_prefix,
        mask,
        order,
        sources,
        destinations,
    )


def threshold_matching(
    metric: Tensor,
    threshold: float,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges every link above a threshold, so the token count follows the content.

    DyMU's dynamic merging (arXiv:2504.17040) without its device-to-host copy: merge with
    num_out = N and use the counts as lengths. At most as many tokens leave as
    `bipartite_soft_matching` allows. Masked tokens map to -1 and take no slot.

    Args:
        metric, num_prefix, mask, order, sources, destinations: as in `bipartite_soft_matching`.
        threshold: links with cosine > threshold merge; not NaN.

    Returns:
        token_map int32 [B, N], and num_out int32 [B], the slots used by every item. Not
        differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: as `bipartite_soft_matching`.
    """
    sources, destinations = _sides(metric, num_prefix, sources, destinations)
    return choose(
        _ops.threshold_matching.default,
        metric,
        threshold,
        num_prefix,
        mask,
        order,
        sources,
        destinations,
    )


def num_out(
    tokens: int,
    r: int,
    num_prefix: int = 0,
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> int:
    """The number of slots in the map that `bipartite_soft_matching` returns for N = tokens.

    Args:
        tokens: N. r, num_prefix, sources, destinations: as given to `bipartite_soft_matching`.

    Returns:
        N - r, with r clamped to (N - num_prefix) // 2 or to the number of sources; at least 0.

    Raises:
        ValueError: r or num_prefix is negative.
    """
    if r < 0 or num_prefix < 0:
        raise ValueError(f"r and num_prefix must be at least 0, got {r} and {num_prefix}")
    for name, side in (("sources", sources), ("destinations", destinations)):
        if side is not None:
            check_tensor(name, side)
    free = larger(tokens - num_prefix, 0)
    if sources is not None:
        limit = sources.shape[-1]
    elif destinations is not None:
        limit = larger(free - destinations.shape[-1], 0)
    else:
        limit = free // 2
    return larger(tokens - smaller(r, limit), 0)


def _sides(
    metric: Tensor, num_prefix: int, sources: Tensor | None, destinations: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Fills in the sources where only destinations are given."""
    if destinations is None or sources is not None:
        return sources, destinations
    check_tensor("metric", metric)
    check_tensor("destinations", destinations)
    return _other_tokens(destinations, metric.shape[1], num_prefix), destinations


def _other_tokens(destinations: Tensor, tokens: int, num_prefix: int) -> Tensor:
    """The positions after the prefix that are no destinations, ascending: int32 [B | 1, Ns].

    Ns assumes distinct destinations after the prefix; entries left over are -1.
    """
    rows = destinations[None] if destinations.dim() == 1 else destinations
    count = larger(tokens - num_prefix - rows.shape[1], 0)
    inside = (rows >= 0) & (rows < tokens)
    position = torch.arange(tokens + 1, dtype=torch.int32, device=rows.device)
    other = ((position >= num_prefix) & (position < tokens)).repeat(rows.shape[0], 1)
    other = other.scatter(1, torch.where(inside, rows, tokens).long(), False)
    slot = other.cumsum(1) - 1
    slot = torch.where(other & (slot < count), slot, count)
    sources = torch.full((rows.shape[0], count + 1), -1, dtype=torch.int32, device=rows.device)
    return sources.scatter(1, slot, position.expand(rows.shape[0], -1)).narrow(1, 0, count)


@torch.library.register_fake("tokred::match")
def _match_fake(
    a: Tensor,
    b: Tensor,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
    weight_a: Tensor | None = None,
    weight_b: Tensor | None = None,
    metric: str = "cosine",
    band: int = -1,
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    torch._check(a.dim() == 3, lambda: f"a must be [B, Na, C], got {a.dim()}-D")
    torch._check(b.dim() == 3, lambda: f"b must be [B, Nb, C], got {b.dim()}-D")
    torch._check(a.shape[0] == b.shape[0], lambda: "b must have the batch size of a")
    torch._check(a.shape[2] == b.shape[2], lambda: "b must have the channels of a")
    shape = a.shape[:2] if k == 1 else (*a.shape[:2], k)
    return a.new_empty(shape, dtype=torch.float32), a.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("tokred::bipartite_soft_matching")
def _bipartite_soft_matching_fake(
    metric: Tensor,
    r: int,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> Tensor:
    torch._check(metric.dim() == 3, lambda: f"metric must be [B, N, C], got {metric.dim()}-D")
    return metric.new_empty(metric.shape[:2], dtype=torch.int32)


@torch.library.register_fake("tokred::threshold_matching")
def _threshold_matching_fake(
    metric: Tensor,
    threshold: float,
    num_prefix: int = 0,
    mask: Tensor | None = None,
    order: str = "tome",
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(metric.dim() == 3, lambda: f"metric must be [B, N, C], got {metric.dim()}-D")
    token_map = metric.new_empty(metric.shape[:2], dtype=torch.int32)
    return token_map, metric.new_empty(metric.shape[:1], dtype=torch.int32)


not_differentiable("match", "bipartite_soft_matching", "threshold_matching")
promote_under_autocast("match", "a", "b")
sharded("match", "a bnc, b bmc, mask_a bn, mask_b bm, weight_a bn, weight_b bm -> bn, bn")
sharded("bipartite_soft_matching", "metric bnc, mask bn, sources bs, destinations bd -> bn")
sharded("threshold_matching", "metric bnc, mask bn, sources bs, destinations bd -> bn, b")


@register_flop_formula(_ops.match)
def _match_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Tensors arrive as their shapes."""
    batch, rows, channels = a
    return 2 * batch * rows * b[1] * channels


@register_flop_formula([_ops.bipartite_soft_matching, _ops.threshold_matching])
def _bipartite_flops(
    metric: Any,
    r: Any,
    num_prefix: Any = 0,
    mask: Any = None,
    order: Any = "tome",
    sources: Any = None,
    destinations: Any = None,
    **kwargs: Any,
) -> int:
    batch, tokens, channels = metric
    if sources is None:
        free = max(tokens - num_prefix, 0)
        pairs = (free // 2) * (free - free // 2)
    else:
        pairs = sources[-1] * destinations[-1]
    return 2 * batch * pairs * channels
