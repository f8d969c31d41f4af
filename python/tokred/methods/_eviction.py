"""What methods that keep fewer keys share: budgets, and scores of keys by observed attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

if TYPE_CHECKING:
    from tokred.patching import EvictionCall


def check_budget(budget: int, least: int, of: str) -> None:
    """Refuses a budget below what is kept in any case."""
    if budget < least:
        raise ValueError(f"budget must be at least {least}, {of}, got {budget}")


def pooled(scores: Tensor, kernel: int, pool: str) -> Tensor:
    """Every key takes the mean or the greatest score of the `kernel` keys around it.

    Args:
        scores: f32 [B, H, N], in the order of places.
    """
    if pool == "max":
        return max_pool1d(scores, kernel, 1, kernel // 2)
    return avg_pool1d(scores, kernel, 1, kernel // 2)


def window_scores(call: EvictionCall, window: int, kernel: int, pool: str) -> Tensor:
    """SnapKV's scores f32 [B, Hkv, M]: the attention from the last `window` queries, pooled over
    neighbours, and inf for the last `window` tokens themselves."""
    scores = call.received(window)
    own = min(window, call.q.shape[2])
    before = scores[..., : scores.shape[2] - own]
    if before.shape[2] > 0:
        before = pooled(before, kernel, pool)
    scores = scores.clone()
    scores[..., : before.shape[2]] = before
    return scores.masked_fill(call.recent(window), float("inf"))
