"""PyramidKV's budgets, and its choice in a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.pyramid_kv import PyramidKvOptions, layer_budget


def test_budgets_fall_evenly_and_sum_up() -> None:
    budgets = [layer_budget(layer, 5, 108, 8, 10_000) for layer in range(5)]
    assert budgets == [8 + 195, 8 + 148, 8 + 100, 8 + 53, 8 + 5]
    assert abs(sum(budgets) - 5 * 108) <= 5
    # The first layer cannot keep more than there is: the last one keeps what it leaves.
    assert [layer_budget(layer, 3, 108, 8, 158) for layer in range(3)] == [158, 108, 58]
    assert layer_budget(0, 1, 108, 8, 10_000) == 108


@pytest.mark.parametrize("layer", [0, 2])
def test_it_keeps_what_the_paper_keeps(layer: int) -> None:
    def published(step: Step) -> Tensor:
        # The row with padding counts it, as the batch is one tensor.
        if step.p.shape[1] < 20:
            return step.alive
        weights = step.grouped(step.p[:, -4:].sum(1))
        scores = torch.zeros_like(weights)
        scores[:, :-4] = max_pool1d(weights[:, :-4], 3, 1, 1)
        scores[:, -4:] = torch.inf
        return keep_best(scores, step.alive, {0: 4 + 9 * 2, 2: 4}[layer])

    options = PyramidKvOptions(budget=13, window=4, kernel=3, beta=20)
    check_layer(options, published, layer=layer, num_layers=3, parts=(40, 1, 1))


def test_refusals() -> None:
    for options, words in (
        ({"budget": 31}, "budget must be at least 32"),
        ({"window": 0}, "window and beta must be at least 1"),
        ({"beta": 0}, "window and beta must be at least 1"),
        ({"kernel": 2}, "kernel must be odd"),
    ):
        with pytest.raises(ValueError, match=words):
            PyramidKvOptions(**options)
