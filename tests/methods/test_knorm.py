"""Knorm: the keys of smallest norm."""

from __future__ import annotations

import pytest
from torch import Tensor

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.knorm import KnormOptions


def test_it_keeps_keys_of_small_norm() -> None:
    def published(step: Step) -> Tensor:
        return keep_best(-step.k.norm(dim=2), step.alive, 10)

    check_layer(KnormOptions(budget=10, skipped=1), published, layer=1)
    check_layer(KnormOptions(budget=10, skipped=1), lambda step: step.alive, layer=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="budget must be at least 1"):
        KnormOptions(budget=0)
    with pytest.raises(ValueError, match="skipped must be at least 0"):
        KnormOptions(skipped=-1)
