"""What the methods share that drop tokens between the layers of an encoder: layers, shares, and the
tokens that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._budgets import keep_count

if TYPE_CHECKING:
    from tokred.patching import ReductionCall


def chosen_layers(at: Sequence[int] | None, num_layers: int) -> list[int]:
    """The layers that drop tokens: those of `at`, a fourth, a half and three fourths in where None.

    Of twelve layers these are 3, 6 and 9, where most papers drop them.

    Raises:
        ValueError: a layer that the model does not have.
    """
    if at is None:
        return sorted({num_layers * part // 4 for part in (1, 2, 3)})
    wrong = [layer for layer in at if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"at must list layers from 0 to {num_layers - 1}, got {wrong[0]}")
    return sorted({*at})


def finite(scores: Tensor) -> Tensor:
    """The scores f32, NaN and -inf as the smallest number: every entry is a candidate, NaN last."""
    smallest = torch.finfo(torch.float32).min
    return torch.nan_to_num(scores.float(), nan=smallest, neginf=smallest)


def best_tokens(scores: Tensor, count: int, num_prefix: int = 0, order: str = "position") -> Tensor:
    """The tokens that stay: the prefix, then the `count` best of the others.

    Args:
        scores: f32 [B, N]; those of the first num_prefix tokens do not count; -inf is never chosen.
        count: at most as many as there are candidates.
        order: of the others, "position" or "score"; equal scores: the lower position.

    Returns:
        i32 [B, num_prefix + count].
    """
    _, chosen = tokred.topk(scores[:, num_prefix:].contiguous(), count, order=order)
    return behind_prefix(chosen, num_prefix)


def behind_prefix(chosen: Tensor, num_prefix: int) -> Tensor:
    """The prefix and the chosen ones i32 [B, K], which are counted from behind it: tokens that
    stay, i32 [B, num_prefix + K]."""
    prefix = torch.arange(num_prefix, dtype=torch.int32, device=chosen.device)
    return torch.cat([prefix.repeat(chosen.shape[0], 1), chosen + num_prefix], 1)


def kept_after(tokens: int, ratio: float) -> int:
    """The share `ratio` of so many tokens, rounded down, at least one."""
    return max(keep_count(tokens, ratio=ratio), 1)


def class_scores(call: ReductionCall) -> Tensor:
    """f32 [B, H, N]: the attention of the class token, or the mean attention that a token receives
    in a model without one."""
    return call.class_attention() if call.num_prefix else call.received_attention()
