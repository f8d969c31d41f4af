"""XTR's scores against every document's, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokred.methods.xtr import late_interaction, retrieve


def by_hand(
    query: Tensor, tokens: Tensor, document: list[int], documents: int, k: int, skip: list[int]
) -> list[float]:
    """The scores of one query [Q, C], in float64; skipped tokens of the query do not count."""
    hits: list[dict[int, float]] = []
    bounds = []
    for i, row in enumerate(query.double() @ tokens.double().T):
        if i in skip:
            continue
        best = sorted(range(len(row)), key=lambda j: (-row[j].item(), j))[:k]
        found: dict[int, float] = {}
        for j in best:
            found[document[j]] = max(found.get(document[j], -math.inf), row[j].item())
        hits.append(found)
        bounds.append(row[best[-1]].item())
    scores = []
    for number in range(documents):
        parts = [found.get(number, bound) for found, bound in zip(hits, bounds, strict=True)]
        hit = any(number in found for found in hits)
        scores.append(sum(parts) / len(parts) if hit else -math.inf)
    return scores


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    query = torch.randn(2, 6, 16, generator=generator).to(dtype)
    tokens = torch.randn(60, 16, generator=generator).to(dtype)
    document = torch.randint(9, (60,), generator=generator).int()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    score, index = retrieve(query, tokens, k)
    given = late_interaction(score, index, document, 10, mask)
    assert given.dtype == torch.float32
    for item, skip in ((0, []), (1, [4, 5])):
        expected = by_hand(query[item], tokens, document.tolist(), 10, k, skip)
        torch.testing.assert_close(
            given[item].double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-4
        )
    alone = late_interaction(score[1:], index[1:], document, 10, mask[1:])
    assert torch.equal(alone[0], given[1])


def test_fewer_tokens_than_asked_for() -> None:
    query, tokens = torch.eye(2)[None], torch.eye(2)
    mask = torch.tensor([True, False])
    score, index = retrieve(query, tokens, 3, mask)
    assert index.tolist() == [[[0, -1, -1], [0, -1, -1]]]
    given = late_interaction(score, index, torch.tensor([1, 0], dtype=torch.int32), 3)
    assert given.tolist() == [[-math.inf, 0.5, -math.inf]]


def test_nan_is_left_out() -> None:
    score = torch.tensor([[[0.9, torch.nan, 0.4], [torch.nan, torch.nan, torch.nan]]])
    index = torch.tensor([[[0, 1, 2], [0, 1, 2]]], dtype=torch.int32)
    document = torch.tensor([0, 1, 2], dtype=torch.int32)
    given = late_interaction(score, index, document, 3)
    torch.testing.assert_close(given, torch.tensor([[0.45, -torch.inf, 0.2]]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        retrieve(torch.zeros(1, 2, 4), torch.zeros(3, 4), 0)
