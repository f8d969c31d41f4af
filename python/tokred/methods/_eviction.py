"""What methods that keep fewer keys share: budgets, and scores of keys by observed attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

if TYPE_CHECKING:
    from tokred.patching import EvictionCall, Replacement

Merged: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""k, v, position and bias, as a Replacement has them."""


def check_budget(budget: int, smallest: int, of: str) -> None:
    """Refuses a budget below what is kept in any case."""
    if budget < smallest:
        raise ValueError(f"budget must be at least {smallest}, {of}, got {budget}")


def check_window(window: int, kernel: int, budget: int) -> None:
    """Raises where window, kernel and budget do not fit window_scores()."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
    check_budget(budget, window, "the window")


def pooled(scores: Tensor, kernel: int, pool: str) -> Tensor:
    """Every key takes the mean or the largest score of the `kernel` keys around it.

    Args:
        scores: f32 [B, H, N], in the order of positions.
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


def merged_prompt(call: EvictionCall, scores: Tensor, merge: Callable[..., Merged]) -> Replacement:
    """What a method that merges makes of the tokens of a prompt, padding left out.

    Args:
        scores: f32 [B, Hkv, N]. merge: is called with k, v, scores and position of tokens that are
            no padding, for all rows at once or one after another.

    With padding this waits for the device. Rows with fewer keys get empty slots.
    """
    states = (call.k, call.v, scores, call.position)
    if call.bias is None:
        return call.replaced(*merge(*states))
    rows = []
    for number, hidden in enumerate(call.bias[:, 0] == -torch.inf):
        real = (~hidden).nonzero()[:, 0]
        rows.append(merge(*(x[number : number + 1].index_select(2, real) for x in states)))
    heads, longest = call.k.shape[1], max(row[0].shape[2] for row in rows)
    k, v = (x.new_zeros(len(rows), heads, longest, x.shape[3]) for x in (call.k, call.v))
    position = torch.full((len(rows), heads, longest), -1, dtype=torch.int32, device=k.device)
    bias = torch.full(position.shape, -torch.inf, device=k.device)
    for number, (own_k, own_v, kept_positions, own_bias) in enumerate(rows):
        count = own_k.shape[2]
        k[number, :, :count], v[number, :, :count] = own_k[0], own_v[0]
        position[number, :, :count] = kept_positions[0]
        bias[number, :, :count] = 0 if own_bias is None else own_bias[0]
    return call.replaced(k, v, position, bias)
