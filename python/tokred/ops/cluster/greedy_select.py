"""Greedy selection of diverse or representative tokens: wrapper and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..placements import sharded
from ..registration import choose, not_differentiable

_ops = torch.ops.tokred


def greedy_select(
    x: Tensor,
    k: int,
    rule: str = "kcenter",
    weight: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "cosine",
    first: str = "rule",
    trade_off: float = 0.5,
) -> Tensor:
    """Picks k tokens one after another, each the best one beside those picked before.

    With S the tokens picked so far, w the weights (1 where None), d the distance (1 - cos, |a - b|,
    -a . b) and s the similarity (cos, -|a - b|, a . b):

    ========== ================================================================================
    "kcenter"  argmax_j w_j min_S d(i, j): farthest points, max-min diversity. DivPrune
               (arXiv:2503.02175); FlashVID's ADTS with weights
    "maxsum"   argmax_j w_j sum_S d(i, j): max-sum diversity, as in ToDRE (arXiv:2505.18757)
    "mmr"      argmax_j trade_off w_j - (1 - trade_off) max_S s(i, j): maximal marginal relevance
    "facility" argmax_j w_j sum_i max(0, s(i, j) - max(0, max_S s(i, .))): facility location, as in
               SCOPE (arXiv:2510.24214)
    ========== ================================================================================

    Args:
        x: [B, N, C] float32, float16 or bfloat16, channels contiguous.
        k: tokens to pick, at least 0; may exceed N.
        rule: see above.
        weight: float32 [B, N].
        start: int32 [B], the first pick of every item; where it may not be picked, `first` decides.
        mask: bool [B, N]; False is never picked, and no distance is measured to it.
        metric: "cosine", "l2" or "dot" (facility: not l2).
        first: the first pick. "rule": the largest weight; of facility the largest gain. "norm": the
            largest norm (the KKZ start of CenterCLIP, arXiv:2205.00823). "isolated": argmax_j of
            w_j times the distance to the nearest other token (the start of ADTS and DivPrune).
        trade_off: of mmr, between 0 and 1.

    Returns:
        indices int32 [B, k] in the order of picking, -1 where no token is left. Equal scores: the
        lower index. A token whose squared norm is not finite (NaN too) counts as masked, and one
        whose score is -inf or NaN, from its weight, is not picked. Not differentiable.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.

    Complexity: at most 2 B N k C flops, memory O(N C) on the CPU and O(N) on CUDA, never N x N. To
        kcenter and mmr, most tokens need only be compared when their old score is the best left
        (lazy greedy, the same result). "isolated", and facility at the start, compare all pairs,
        2 B N^2 C flops; on the CPU "isolated" compares each pair at most once, and tokens that
        cannot be the first pick only with those that can. Facility then sums the gains again, 2 N C
        flops each, of candidates whose old gain is the best left.
    """
    return choose(
        _ops.greedy_select.default, x, k, rule, weight, start, mask, metric, first, trade_off
    )


@torch.library.register_fake("tokred::greedy_select")
def _greedy_select_fake(
    x: Tensor,
    k: int,
    rule: str = "kcenter",
    weight: Tensor | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "cosine",
    first: str = "rule",
    trade_off: float = 0.5,
) -> Tensor:
    torch._check(x.dim() == 3, lambda: f"x must be [B, N, C], got {x.dim()}-D")
    torch._check(k >= 0, lambda: "k must be at least 0")
    return x.new_empty((x.shape[0], k), dtype=torch.int32)


not_differentiable("greedy_select")
sharded("greedy_select", "x bnc, weight bn, start b, mask bn -> bk")
