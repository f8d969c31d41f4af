"""Ada-KV: heads share a budget out by their scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.ada_kv import AdaKvOptions, head_budgets

BUDGET, WINDOW, SAFEGUARD = 14, 4, 0.25


def shares(scores: Tensor, budget: int) -> list[int]:
    """The tokens of largest score count for their heads."""
    ranked = sorted(
        (-float(scores[h, j]), h, j) for h in range(2) for j in range(scores.shape[1])
         if scores[h, j] > -torch.inf
    )[: 2 * budget]  # fmt: skip
    won = [sum(h == head for _, h, _ in ranked) for head in range(2)]
    return [round((1 - SAFEGUARD) * each + SAFEGUARD * budget) for each in won]


def published(step: Step) -> Tensor:
    if not step.is_prompt:
        return step.alive
    weights = step.grouped(step.p[:, -WINDOW:].sum(1))
    scores = torch.full_like(weights, -torch.inf)
    scores[:, :-WINDOW] = max_pool1d(weights[:, :-WINDOW], 3, 1, 1)
    budgets = [each + WINDOW for each in shares(scores, BUDGET - WINDOW)]
    assert sum(budgets) == 2 * BUDGET and budgets[0] != budgets[1]
    scores[:, -WINDOW:] = torch.inf
    return keep_best(scores, step.alive, budgets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_keep_different_numbers(dtype: torch.dtype) -> None:
    options = AdaKvOptions(budget=BUDGET, window=WINDOW, safeguard=SAFEGUARD, kernel=3)
    check_layer(options, published, dtype, parts=(40, 1, 1, 1))


def test_budgets() -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6], [5, 1, 1, 1]]])
    assert head_budgets(scores, 2, 0.0).tolist() == [[4, 0]]
    assert head_budgets(scores, 2, 0.5).tolist() == [[3, 1]]
    assert head_budgets(scores, 2, 1.0).tolist() == [[2, 2]]


def test_refusals() -> None:
    for options, words in (
        ({"budget": 31}, "budget must be at least 32"),
        ({"window": 0}, "window must be at least 1"),
        ({"kernel": 2}, "kernel must be odd"),
        ({"safeguard": 1.5}, "safeguard must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            AdaKvOptions(**options)
