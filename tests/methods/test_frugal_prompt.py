"""FrugalPrompt's choice among given scores."""

from __future__ import annotations

import math

import pytest
import torch

from tokred.methods.frugal_prompt import frugal_keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 1.0])
def test_tokens_that_stay(dtype: torch.dtype, ratio: float) -> None:
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[2] = scores[2].round(decimals=1)
    valid = torch.arange(30) >= torch.tensor([[0], [7], [29]])
    must = torch.zeros(3, 30, dtype=torch.bool)
    must[:, -1] = True
    kept = frugal_keep(scores, ratio, valid, must)
    for item in range(3):
        there = valid[item].nonzero()[:, 0].tolist()
        count = max(math.floor(round(len(there) * ratio, 6)), 1)
        ranked = sorted(there, key=lambda i: (not must[item, i], -scores[item, i].item(), i))
        expected = sorted(ranked[:count])
        assert kept[item].tolist() == expected + [-1] * (30 - len(expected))


def test_equal_scores_and_nan() -> None:
    assert frugal_keep(torch.ones(1, 6), 0.5).tolist() == [[0, 1, 2, -1, -1, -1]]
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 2.0]])
    assert frugal_keep(scores, 1.0).tolist() == [[1, 3, -1, -1]]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert frugal_keep(scores, 1.0, nothing).tolist() == [[-1] * 4]


def test_refusals() -> None:
    for ratio in (0.0, 1.2):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            frugal_keep(torch.rand(1, 4), ratio)
