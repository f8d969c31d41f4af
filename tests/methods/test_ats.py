"""Adaptive Token Sampling against the sampling written out, and in a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.dropping import Layer, check_dropping
from cases.groups import check_in_a_model
from tokred.methods.ats import AtsOptions, ats_keep, ats_sample, significance


def picks(scores: Tensor, count: int) -> list[int]:
    """The distinct tokens of one item that `count` samples pick, by ascending score."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i].item(), i))
    total = scores[order].double().cumsum(0)
    total = (total - total[0]) / (total[-1] - total[0])
    start = min(value for value in total.tolist() if value > 0)
    found = []
    for i in range(count):
        y = start + i * (1 - start) / (count - 1)
        found.append((total - y).abs().argmin().item())
    return [order[place] for place in sorted({*found})]


def filled(scores: Tensor, keep: int) -> list[int]:
    """`keep` tokens: the picks, then the best of the others."""
    first = picks(scores, keep)
    others = sorted((i for i in range(len(scores)) if i not in first), key=lambda i: -scores[i])
    return sorted([*first, *others[: keep - len(first)]])


@pytest.mark.parametrize("tokens", [6, 30, 49])
def test_sampling(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(3, tokens, generator=generator) ** 4
    scores = scores / scores.sum(1, keepdim=True)
    for count in (3, tokens // 2 + 1, tokens):
        indices, counts = ats_sample(scores, count)
        kept = ats_keep(scores, count)
        for item in range(3):
            expected = picks(scores[item], count)
            assert indices[item].tolist() == expected + [-1] * (count - len(expected))
            assert counts[item] == len(expected)
            assert kept[item].tolist() == filled(scores[item], count)
        assert torch.equal(ats_keep(scores[1:2], count), kept[1:2])


def test_masked_tokens_are_never_picked() -> None:
    scores, mask = torch.rand(2, 20), torch.rand(2, 20) > 0.4
    indices, counts = ats_sample(scores, 20, mask)
    for row, count, valid in zip(indices, counts, mask, strict=True):
        assert valid[row[:count].long()].all() and (row[count:] == -1).all()


def test_scores_without_an_order() -> None:
    """Equal scores and NaN: as many tokens as asked for, in any case."""
    for value in (1.0, 0.0, torch.nan):
        kept = ats_keep(torch.full((1, 9), value), 5)
        assert kept.shape == (1, 5) and len({*kept[0].tolist()}) == 5


def test_significance() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        attention, v = torch.rand(2, 3, 7), torch.randn(2, 3, 7, 4).to(dtype)
        values = v.transpose(1, 2).flatten(2).double().norm(dim=-1)
        expected = attention.sum(1) * values
        expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(
            significance(attention, v).double(), expected, atol=1e-6, rtol=1e-5
        )
    assert not significance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 4)).any()


def chosen(layer: Layer) -> Tensor | None:
    if layer.number == 0:
        return None
    scores = significance(layer.attention[:, :, 0], layer.v)[:, 1:]
    keep = int(scores.shape[1] * 0.7)
    return torch.tensor([[0, *(i + 1 for i in filled(row, keep))] for row in scores])


def test_in_a_model() -> None:
    check_dropping("ats", dict(ratio=0.7, first=1), chosen)
    check_in_a_model("ats", dict(ratio=1.0), dict(ratio=0.75), (37, 28, 21, 16))
    check_in_a_model(
        "ats", dict(ratio=1.0), dict(ratio=0.5), (36, 18, 9, 4), class_token=False,
        global_pool="avg",
    )  # fmt: skip
    assert list(AtsOptions().layers(12)) == list(range(3, 12))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="keep must be from 0 to 9, got 10"):
        ats_keep(torch.rand(1, 9), 10)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        AtsOptions(ratio=0.0)
    with pytest.raises(ValueError, match="first must be at least 0, got -1"):
        AtsOptions(first=-1)
