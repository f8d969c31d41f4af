"""H2O beside attention weights that are summed over all queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from cases.eviction import Step, check_layer, keep_best
from tokred.methods.h2o import H2oOptions

BUDGET = 13


@pytest.mark.parametrize(
    ("recent", "dtype", "softcap"),
    [(None, torch.float32, None), (None, torch.bfloat16, None), (3, torch.float32, None),
     (3, torch.bfloat16, None), (None, torch.float32, 0.7)],
)  # fmt: skip
def test_it_keeps_heavy_hitters(
    recent: int | None, dtype: torch.dtype, softcap: float | None
) -> None:
    def published(step: Step) -> Tensor:
        total = step.grouped(step.p.sum(1))
        if "total" in step.memory:
            before = step.memory["total"]
            total = total + pad(before, (0, total.shape[1] - before.shape[1]))
        step.memory["total"] = total
        scores = total.clone()
        scores[:, -(BUDGET - BUDGET // 2 if recent is None else recent) :] = torch.inf
        return keep_best(scores, step.alive, BUDGET)

    check_layer(H2oOptions(budget=BUDGET, recent=recent), published, dtype, softcap=softcap)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="budget must be at least 5, the last tokens, got 4"):
        H2oOptions(budget=4, recent=5)
    with pytest.raises(ValueError, match="recent must be at least 1"):
        H2oOptions(recent=0)
