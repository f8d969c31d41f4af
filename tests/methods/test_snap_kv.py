"""SnapKV beside the listing of its paper, which forms the attention weights of the window."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.snap_kv import SnapKvOptions

BUDGET, WINDOW, KERNEL = 14, 5, 3


def published(pool: str) -> object:
    def rule(step: Step) -> Tensor:
        if not step.is_prompt or step.alive[0].sum() <= BUDGET:
            return step.alive
        weights = step.grouped(step.p[:, -WINDOW:].sum(1))
        tokens = weights.shape[1]
        scores = torch.zeros_like(weights)
        function = max_pool1d if pool == "max" else avg_pool1d
        for head, living in enumerate(step.alive):
            # Neighbours are those in the cache.
            places = living.nonzero()[:, 0]
            before = places[places < tokens - WINDOW]
            scores[head, before] = function(weights[head, None, before], KERNEL, 1, KERNEL // 2)[0]
        scores[:, tokens - WINDOW :] = torch.inf
        return keep_best(scores, step.alive, BUDGET)

    return rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_it_keeps_what_the_paper_keeps(pool: str, dtype: torch.dtype) -> None:
    options = SnapKvOptions(budget=BUDGET, window=WINDOW, kernel=KERNEL, pool=pool)
    check_layer(options, published(pool), dtype)


def test_refusals() -> None:
    for options, words in (
        ({"budget": 31}, "budget must be at least 32, the window, got 31"),
        ({"window": 0}, "window must be at least 1"),
        ({"kernel": 4}, "kernel must be odd"),
    ):
        with pytest.raises(ValueError, match=words):
            SnapKvOptions(**options)
