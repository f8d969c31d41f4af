"""Adaptive Sparse ViT's scores and thresholds against whole attention matrices, and in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.dropping import Layer, check_dropping
from cases.groups import check_in_a_model
from tokred.methods.adaptive_sparse_vit import (
    AdaptiveSparseVitOptions,
    above_threshold,
    head_scores,
    running_score,
)


def scores_by_hand(attention: Tensor, out: Tensor) -> Tensor:
    """[N] of one item, token by token: attention [H, N], out [H, N, D]."""
    scores = []
    for token in range(attention.shape[1]):
        norms = [out[head, token].double().norm() for head in range(len(out))]
        shares = [norm / (sum(norms) + 1e-8) for norm in norms]
        scores.append(sum(a * s for a, s in zip(attention[:, token].double(), shares, strict=True)))
    return torch.stack(scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(dtype: torch.dtype) -> None:
    attention, out = torch.rand(2, 3, 11), torch.randn(2, 3, 11, 5).to(dtype)
    out[0, :, 4] = 0
    scores = head_scores(attention, out)
    for item in range(2):
        expected = scores_by_hand(attention[item], out[item])
        torch.testing.assert_close(scores[item].double(), expected, rtol=1e-5, atol=1e-6)


def test_threshold() -> None:
    scores = torch.tensor([[0.0, 0.5, 0.001, 0.2, torch.nan], [0.9, 0.0, 0.001, 0.0, 0.0]])
    kept, counts = above_threshold(scores, 0.001)
    assert kept.tolist() == [[0, 1, 3, -1, -1], [0, -1, -1, -1, -1]] and counts.tolist() == [3, 1]
    valid = torch.tensor([[True, False, True, True, True]] * 2)
    kept, counts = above_threshold(scores, 0.001, valid=valid)
    assert kept[0, :2].tolist() == [0, 3] and counts.tolist() == [2, 1]


def test_scores_over_layers() -> None:
    one, two = torch.rand(2, 5), torch.rand(2, 5)
    assert torch.equal(running_score(None, one), one)
    torch.testing.assert_close(running_score(one, two), one + two)
    torch.testing.assert_close(running_score(one, two, 0.99), 0.99 * one + 0.01 * two)


def chosen(layer: Layer) -> Tensor | None:
    if layer.number == 1:
        return None
    out = layer.attention @ layer.v
    rows = []
    for attention, heads in zip(layer.attention[:, :, 0], out, strict=True):
        scores = scores_by_hand(attention, heads)[1:]
        best = scores.topk(int(len(scores) * 0.6)).indices + 1
        rows.append([0, *sorted(best.tolist())])
    return torch.tensor(rows)


def test_in_a_model() -> None:
    check_dropping("adaptive_sparse_vit", dict(ratio=0.6, at=[2, 0]), chosen)
    check_in_a_model("adaptive_sparse_vit", dict(ratio=1.0), dict(ratio=0.75), (37, 28, 21, 16))
    check_in_a_model(
        "adaptive_sparse_vit", dict(ratio=1.0), dict(ratio=0.5), (36, 18, 9, 4), class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got -1"):
        AdaptiveSparseVitOptions(ratio=-1.0)
