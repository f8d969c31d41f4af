"""TOVA beside the weights of the last query, averaged over all heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.tova import TovaOptions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_what_the_last_query_attends_to(dtype: torch.dtype) -> None:
    def published(step: Step) -> Tensor:
        weights = step.p[:, -1].mean(0, keepdim=True)
        return keep_best(weights.expand(2, -1), step.alive, 12)

    check_layer(TovaOptions(budget=12), published, dtype)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="budget must be at least 1"):
        TovaOptions(budget=0)
