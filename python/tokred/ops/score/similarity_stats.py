"""Statistics of similarities that are never stored, and of what a layer does to its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..placements import sharded
from ..registration import call, promote_under_autocast, without_gradient

_ops = torch.ops.tokred


@dataclass(frozen=True)
class SimilarityStats:
    """What `similarity_stats` returns: one number per row of a, each [B, Na]."""

    mean: Tensor
    variance: Tensor
    largest: Tensor
    index: Tensor
    count: Tensor
    energy: Tensor


def similarity_stats(
    a: Tensor,
    b: Tensor | None = None,
    metric: str = "cosine",
    threshold: float = 0.0,
    energy: str = "none",
    margin: float = 0.0,
    exclude_self: bool = False,
    block_size: int = 0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> SimilarityStats:
    """Statistics of every row of the similarity matrix of a and b, which is never stored.

    Row i's partners are the j with mask_b, in i's block with a block_size, and other than i with
    exclude_self. The energies are means over the partners of

    ========== =================================================================================
    "elu"      s where s >= margin, after subtracting the margin; exp(s - margin) - 1 below it:
               PiToMe (arXiv:2405.16148)
    "gaussian" exp(-((1 - s) / d)^2 / 2) / (d sqrt(2 pi)) with d = 1 - margin
    "none"     0
    ========== =================================================================================

    Args:
        a: [B, Na, C] float32, float16 or bfloat16, channels contiguous.
        b: [B, Nb, C], dtype and device of a; a itself where None, with mask_a where mask_b is None.
        metric: as in `match`.
        threshold: what `count` counts the similarities above.
        energy, margin: see above.
        exclude_self: leave out the pairs i = j.
        block_size: where positive, only pairs with i // block_size = j // block_size count.
        mask_a, mask_b: bool [B, Na] and [B, Nb]; False takes the row out.

    Returns:
        SimilarityStats: mean, variance (biased), largest (the maximum) and energy float32
        [B, Na]; index int32, the first partner of maximum similarity; count int32. A masked row,
        and one without partners, has largest -inf, index -1, and 0 otherwise. NaN is never the
        maximum. Under autocast a and b are cast to the wider dtype of the two.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
        ValueError: an input requires grad.

    Complexity: 2 B Na Nb C flops, memory linear in Na and Nb.
    """
    if b is None:
        b = a
        mask_b = mask_a if mask_b is None else mask_b
    mean, variance, largest, index, count, energies = call(
        _ops.similarity_stats.default, a, b, metric, threshold, energy, margin, exclude_self,
        block_size, mask_a, mask_b,
    )  # fmt: skip
    return SimilarityStats(mean, variance, largest, index, count, energies)


def transition_stats(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """How a layer changes its tokens: |after| / |before| and the cosine between them.

    What TransPrune (arXiv:2507.20630) weighs tokens by. Norms are at least 1e-12, so a zero row
    has cosine 0.

    Args:
        before, after: [B, N, C] float32, float16 or bfloat16, channels contiguous.

    Returns:
        ratio and cosine, float32 [B, N]. Under autocast the inputs are cast to the wider dtype.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
        ValueError: an input requires grad.

    Complexity: one read of both.
    """
    return call(_ops.transition_stats.default, before, after)


@torch.library.register_fake("tokred::similarity_stats")
def _similarity_stats_fake(
    a: Tensor,
    b: Tensor,
    metric: str = "cosine",
    threshold: float = 0.0,
    energy: str = "none",
    margin: float = 0.0,
    exclude_self: bool = False,
    block_size: int = 0,
    mask_a: Tensor | None = None,
    mask_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(a.dim() == 3, lambda: f"a must be [B, Na, C], got {a.dim()}-D")
    torch._check(b.dim() == 3, lambda: f"b must be [B, Nb, C], got {b.dim()}-D")
    torch._check(a.shape[0] == b.shape[0], lambda: "b must have the batch size of a")
    torch._check(a.shape[2] == b.shape[2], lambda: "b must have the channels of a")
    wide, whole = torch.float32, torch.int32
    mean, variance, largest, index, count, energies = (
        a.new_empty(a.shape[:2], dtype=dtype) for dtype in (wide, wide, wide, whole, whole, wide)
    )
    return mean, variance, largest, index, count, energies


@torch.library.register_fake("tokred::transition_stats")
def _transition_stats_fake(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(before.dim() == 3, lambda: f"before must be [B, N, C], got {before.dim()}-D")
    torch._check(after.dim() == 3, lambda: f"after must be [B, N, C], got {after.dim()}-D")
    ratio = before.new_empty(before.shape[:2], dtype=torch.float32)
    return ratio, torch.empty_like(ratio)


without_gradient("similarity_stats")
without_gradient("transition_stats")
promote_under_autocast("similarity_stats", "a", "b")
promote_under_autocast("transition_stats", "before", "after")
sharded("similarity_stats", "a bnc, b bmc, mask_a bn, mask_b bm -> bn, bn, bn, bn, bn, bn")
sharded("transition_stats", "before bnc, after bnc -> bn, bn")


@register_flop_formula(_ops.similarity_stats)
def _similarity_flops(
    a: Any,
    b: Any,
    metric: Any = "cosine",
    threshold: Any = 0.0,
    energy: Any = "none",
    margin: Any = 0.0,
    exclude_self: Any = False,
    block_size: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Tensors arrive as their shapes; only the pairs inside blocks are computed."""
    batch, rows, channels = a
    partners = min(block_size, b[1]) if block_size else b[1]
    return 2 * batch * rows * partners * channels
