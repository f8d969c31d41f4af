"""Expected Attention beside its formulas with matrices of rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.eviction import DIM, GROUP, HEADS, Step, check_layer, keep_best
from tokred.methods.expected_attention import ExpectedAttentionOptions

BUDGET, SINKS, FUTURE = 15, 2, 7
FREQUENCIES = 100.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


class Tables:
    """A rotary embedding, as options are given it."""

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length)[:, None] * FREQUENCIES.repeat(2)
        return angles.cos().float(), angles.sin().float()


def rotation(place: int) -> Tensor:
    """The matrix that rotates a column of DIM numbers to a place."""
    half, angles = DIM // 2, place * FREQUENCIES
    matrix = torch.zeros(DIM, DIM, dtype=torch.float64)
    for i in range(half):
        c, s = angles[i].cos(), angles[i].sin()
        matrix[i, i] = matrix[i + half, i + half] = c
        matrix[i, i + half], matrix[i + half, i] = -s, s
    return matrix


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_what_the_future_expects(covariance: bool, dtype: torch.dtype) -> None:
    def published(step: Step) -> Tensor:
        tokens = step.k.shape[1]
        if not step.is_prompt or step.p.shape[1] < tokens:
            return step.alive
        mean_rotation = torch.stack([rotation(tokens + j) for j in range(FUTURE)]).mean(0)
        scores = torch.zeros(HEADS, tokens, dtype=torch.float64)
        for head in range(HEADS * GROUP):
            queries = [rotation(i).T @ step.q[head, i] for i in range(SINKS, tokens)]
            queries = torch.stack(queries)
            mu = mean_rotation @ queries.mean(0)
            spread = mean_rotation @ torch.cov(queries.T, correction=0) @ mean_rotation.T
            keys = step.k[head // GROUP, SINKS:]
            logits = keys @ mu / DIM**0.5
            if covariance:
                logits = logits + torch.einsum("ni,ij,nj->n", keys, spread, keys) / DIM / 2
            scores[head // GROUP, SINKS:] += logits.softmax(0) / GROUP
        scores *= step.v.norm(dim=2)
        scores[:, :SINKS] = torch.inf
        return keep_best(scores, step.alive, BUDGET)

    options = ExpectedAttentionOptions(
        budget=BUDGET, sinks=SINKS, future=FUTURE, covariance=covariance
    )
    check_layer(options, published, dtype, rotary=Tables(), parts=(40, 1, 1))


def test_refusals() -> None:
    for options, words in (
        ({"budget": 3}, "budget must be at least 4, the sinks"),
        ({"sinks": -1}, "sinks must be at least 0"),
        ({"future": 0}, "future must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ExpectedAttentionOptions(**options)
