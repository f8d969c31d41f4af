"""The relevance of tokens against the whole roll-out, and the choice by it."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import picks_of
from tokred.methods.explain_compressor import explain_compressor, relevance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relevance_is_a_row_of_the_roll_out(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    attention = [torch.randn(2, 3, tokens, tokens, generator=generator) for _ in range(3)]
    attention = [a.softmax(-1).to(dtype) for a in attention]
    gradient = [torch.randn(a.shape, generator=generator).to(dtype) for a in attention]
    rollout = torch.eye(tokens, dtype=torch.float64).repeat(2, 1, 1)
    for weights, slope in zip(attention, gradient, strict=True):
        rollout = rollout + (weights.double() * slope.double()).clamp(min=0).mean(1) @ rollout
    close = dict(rtol=1e-4, atol=1e-6)
    got = relevance(attention, gradient)
    torch.testing.assert_close(got, rollout[:, -1].float(), **close)
    target = torch.tensor([2, 5])
    expected = torch.stack([rollout[0, 2], rollout[1, 5]]).float()
    torch.testing.assert_close(relevance(attention, gradient, target), expected, **close)
    alone = relevance([a[1:] for a in attention], [g[1:] for g in gradient])
    torch.testing.assert_close(alone, got[1:])


def test_choice() -> None:
    scores = torch.tensor([[0.5, 0.25, 1.0, torch.nan]]).repeat(2, 1)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    assert picks_of(explain_compressor(scores, valid=valid)) == [[0, 2], [0]]
    assert explain_compressor(scores, keep=3, order="score").tolist() == [[2, 0, 1]] * 2


def test_refusals() -> None:
    a = [torch.zeros(1, 1, 3, 3)]
    for attention, gradient, target, words in (
        ([], [], -1, "one tensor for each of the layers"),
        (a, [], -1, "got 0 for 1"),
        (a, [torch.zeros(1, 1, 3, 4)], -1, r"must be \[B, H, 3, 3\], got .*\[1, 1, 3, 4\]"),
        (a, a, 3, "target must be one of 3 tokens, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            relevance(attention, gradient, target)
