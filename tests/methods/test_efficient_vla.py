"""EfficientVLA's choice of tokens and layers, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods.efficient_vla import (
    computed_steps,
    layer_importance,
    layers_to_drop,
    select,
    task_scores,
)


def by_hand(
    x: Tensor, scores: Tensor, keep: int, num_key: int, alpha: float, valid: Tensor
) -> list[int]:
    there = valid.nonzero()[:, 0].tolist()
    ranked = sorted(there, key=lambda i: (-scores[i].item(), i))
    first = num_key + int(alpha * (keep - num_key))
    key, taken = ranked[:num_key], ranked[:first]
    unit = functional.normalize(x.double(), dim=-1)
    near = {i: max((unit[i] @ unit[j]).item() for j in key) for i in ranked[first:]}
    return taken + sorted(near, key=lambda i: (near[i], i))[: keep - first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keep", "num_key", "alpha"), [(12, 4, 0.5), (9, 1, 0.0), (8, 3, 1.0)])
def test_tokens(dtype: torch.dtype, keep: int, num_key: int, alpha: float) -> None:
    x = tokens_of(3, 40).to(dtype)
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(40) < torch.tensor([[40], [25], [keep]])
    by_rank = select(x, scores, keep, num_key, alpha, valid, order="score")
    in_place = select(x, scores, keep, num_key, alpha, valid)
    for item in range(3):
        expected = by_hand(x[item].float(), scores[item], keep, num_key, alpha, valid[item])
        assert by_rank[item].tolist() == expected
        assert in_place[item].tolist() == sorted(expected)
    alone = select(x[1:2], scores[1:2], keep, num_key, alpha, valid[1:2])
    assert torch.equal(alone[0], in_place[1])


def test_more_than_there_are_and_nan() -> None:
    x, scores = tokens_of(1, 6), torch.rand(1, 6)
    assert select(x, scores, 20).tolist() == [[0, 1, 2, 3, 4, 5]]
    scores[0, 2] = torch.nan
    assert select(x, scores, 6, 2).tolist() == [[0, 1, 3, 4, 5, -1]]
    assert select(x, torch.full((1, 6), torch.nan), 4, 2).tolist() == [[-1] * 4]
    assert select(x, torch.ones(1, 6), 3, 3).tolist() == [[0, 1, 2]]


def test_scores() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 20, 8)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5
    hidden = torch.ones(5, 20, dtype=torch.bool).triu(16)
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean(1).sum(1)[:, 3:15]
    given = task_scores(q, k, slice(3, 15))
    torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-5)


def test_layers() -> None:
    before, after = torch.randn(2, 2, 7, 5)
    cosine = functional.cosine_similarity(before, after, dim=-1)
    torch.testing.assert_close(layer_importance(before, after), 1 - cosine.mean())
    valid = torch.rand(2, 7) < 0.5
    valid[0, 0] = True
    given = layer_importance(before, after, valid)
    torch.testing.assert_close(given, 1 - cosine[valid].mean())
    assert layers_to_drop(torch.tensor([0.9, 0.1, 0.3, 0.1, 0.5]), 3) == [1, 2, 3]
    assert layers_to_drop(torch.rand(4), 0) == []


def test_steps() -> None:
    assert computed_steps(12) == [12, 10, 5] and computed_steps(3, 1) == [3, 2, 1]


def test_refusals() -> None:
    x, scores = torch.randn(1, 6, 4), torch.rand(1, 6)
    for options, words in (
        (dict(keep=3), "num_key must be from 1 to keep = 3, got 4"),
        (dict(num_key=0), "num_key must be from 1 to keep = 56, got 0"),
        (dict(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            select(x, scores, **options)
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        computed_steps(4, 0)
