"""Decoding with the keys of one sequence split over the ranks of a process group.

Every rank holds some of the keys, in any order, and all ranks the same queries. Each attends to its
own keys; one gathering of the results, as large as the queries and not as the keys, makes them the
attention to all.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import combine_states, topk_with_counts

__all__ = ["combine_over_ranks", "topk_over_ranks", "votes_over_ranks"]


def combine_over_ranks(
    out: Tensor, lse: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """The attention to the keys of all ranks, from each rank's attention to its own.

    The results are combined in the order of the ranks, in float32, so that all ranks hold the same
    bits, and the same in every run.

    Args:
        out: [B, H, L, D] and lse: float32 [B, H, L] of an attention op over this rank's keys; 0 and
            -inf where it has none.
        group: of the ranks; all of them where None.

    Returns:
        out in the dtype of out, and lse.

    Raises:
        ValueError: as `combine_states`.

    Communication: one all_gather of B H L (D + 1) float32 numbers a rank.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return out, lse
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    own = torch.cat([out.to(wide), lse[..., None].to(wide)], -1)
    everyone = own.new_empty((size, *own.shape))
    dist.all_gather([*everyone], own, group=group)
    outs, lses = everyone[..., :-1], everyone[..., -1].contiguous()
    total, total_lse = outs[0], lses[0]
    for rank in range(1, size):
        total, total_lse = combine_states(total, total_lse, outs[rank], lses[rank])
    return total.to(out.dtype), total_lse


def votes_over_ranks(logits: Tensor, lse: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Softmax votes of all heads for this rank's keys, the softmax being over the keys of all.

    Args:
        logits: [B, H, N], of this rank's N keys (`qk_score` with reduce="none"); -inf is no key.
        lse: float32 [B, H], the log of the sum of their exponentials: `logits.logsumexp(-1)`.
        group: of the ranks; all of them where None.

    Returns:
        float32 [B, 1, N]: what `qk_score` with reduce="softmax_vote" has for these keys among all.

    Communication: one all_gather of B H float32 numbers a rank.
    """
    everyone = lse.new_empty((dist.get_world_size(group), *lse.shape))
    dist.all_gather([*everyone], lse.contiguous(), group=group)
    total = everyone.logsumexp(0)[..., None]
    return torch.where(logits == -torch.inf, 0, (logits - total).exp()).sum(1, keepdim=True)


def topk_over_ranks(
    scores: Tensor, k: int, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Which of this rank's keys are among the k best of all ranks.

    On a tie the lower rank comes first, then the lower index: what `topk` chooses from the scores
    of all ranks one behind the other.

    Args:
        scores: float32 [B, H, N], of this rank's N keys; -inf is no key.
        k: keys chosen over all ranks.
        group: of the ranks; all of them where None.

    Returns:
        indices int32 [B, H, min(k, N)] into this rank's keys, ascending, -1 behind the last, and
        counts int32 [B, H].

    Communication: one all_gather of B H k float32 numbers a rank.
    """
    rank, size, keys = dist.get_rank(group), dist.get_world_size(group), scores.shape[-1]
    best, _, _ = topk_with_counts(scores, min(k, keys))
    best = torch.nn.functional.pad(best, (0, k - best.shape[-1]), value=-torch.inf)
    everyone = best.new_empty((size, *best.shape))
    dist.all_gather([*everyone], best, group=group)
    _, winners, _ = topk_with_counts(everyone.movedim(0, -2).flatten(-2), k)
    own = ((winners >= rank * k) & (winners < (rank + 1) * k)).sum(-1, dtype=torch.int32)
    _, indices, counts = topk_with_counts(scores, min(k, keys), order="position", row_k=own)
    return indices, counts
