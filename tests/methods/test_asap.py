"""ASAP's surprisal and its pruning of steps, one step after the other."""

from __future__ import annotations

import math

import pytest
import torch

from tokred.methods.asap import first_token_surprisal, prune_steps, steps_to_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surprisal(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 20, 11).to(dtype)
    ids = torch.randint(11, (2, 20))
    starts = torch.tensor([[0, 4, 9, 19], [3, 8, -1, -1]], dtype=torch.int32)
    given = first_token_surprisal(logits, ids, starts)
    for item in range(2):
        for step, start in enumerate(starts[item].tolist()):
            if start == 0:
                assert given[item, step] == math.inf
            elif start < 0:
                assert given[item, step].isnan()
            else:
                p = logits[item, start - 1].double().softmax(-1)[ids[item, start]]
                assert given[item, step].item() == pytest.approx(-math.log(p), abs=1e-4)


@pytest.mark.parametrize("budget", [0, 10, 25, 1000])
def test_steps(budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    surprisal = torch.rand(3, 9, generator=generator)
    surprisal[1] = surprisal[1].round(decimals=1)  # ties
    surprisal[2, 6:] = torch.nan
    lengths = torch.randint(1, 8, (3, 9), generator=generator)
    lengths[2, 6:] = 0
    given = prune_steps(surprisal, lengths, budget)
    for item in range(3):
        left = [s for s in range(9) if lengths[item, s] > 0]
        while sum(lengths[item, s].item() for s in left) > budget:
            left.remove(min(left, key=lambda s: (surprisal[item, s].item(), -s)))
        assert given[item].nonzero()[:, 0].tolist() == left
    rows = prune_steps(surprisal, lengths, torch.tensor([budget, 5, 0]))
    assert torch.equal(rows[0], given[0]) and not rows[2].any()


def test_tokens() -> None:
    starts = torch.tensor([[2, 5, 9], [0, 3, -1]], dtype=torch.int32)
    keep = torch.tensor([[True, False, True], [False, True, True]])
    kept = steps_to_tokens(keep, starts, 14, torch.tensor([12, 6]))
    expected = [[0, 1, 2, 3, 4, 9, 10, 11, 12, 13], [*range(3, 14)]]
    for row, tokens in zip(kept, expected, strict=True):
        assert row.tolist() == tokens + [-1] * (14 - len(tokens))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="budget must be at least 0, got -1"):
        prune_steps(torch.rand(1, 2), torch.ones(1, 2), -1)
    with pytest.raises(ValueError, match=r"logits must be \[B, N, V\], ids \[B, N\] and starts"):
        first_token_surprisal(torch.rand(1, 4, 3), torch.zeros(1, 5), torch.zeros(1, 2))
