"""TCA's condensation of a layer's tokens, one after the other, and in a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tokred
from cases.groups import check_in_a_model, tokens_of
from tokred.methods.tca_condensation import TcaCondensationOptions, band_sizes, condense


def by_hand(x: Tensor, scores: Tensor, ratio: float, num_prefix: int, centres: int) -> Tensor:
    """What one item's tokens [N, C] become."""
    tokens = len(x) - num_prefix
    left = math.ceil(round(ratio * tokens, 9))
    m = tokens + 1 - left
    ranked = sorted(range(num_prefix, len(x)), key=lambda i: (-scores[i].item(), i))
    kept, band, gone = (
        ranked[: max(left - 2 * m, 0)],
        ranked[max(left - 2 * m, 0) : left],
        ranked[left:],
    )
    rows = x.double()
    out = [*rows[:num_prefix], *rows[kept]]
    picked = band[:1]
    while band and len(picked) < min(centres, len(band)):
        away = {i: min((rows[i] - rows[c]).norm().item() for c in picked) for i in band}
        picked.append(max((i for i in band if i not in picked), key=lambda i: away[i]))
    groups: dict[int, list[tuple[int, float]]] = {c: [] for c in picked}
    for i in band:
        distance = {c: (rows[i] - rows[c]).norm().item() for c in picked}
        nearest = min(picked, key=lambda c: distance[c])
        d = distance[nearest]
        groups[nearest].append((i, 1.0 if d == 0 else 1 / d))
    for members in groups.values():
        total = sum(weight for _, weight in members)
        out.append(sum(rows[i] * weight for i, weight in members) / total)
    if gone:
        out.append(sum(rows[i] * scores[i].double() for i in gone))
    return torch.stack(out)


@pytest.mark.parametrize(("tokens", "num_prefix"), [(41, 1), (30, 0), (38, 2), (6, 1)])
@pytest.mark.parametrize(("ratio", "centres"), [(0.9, 4), (0.8, 2), (0.5, 4), (1.0, 4)])
def test_tokens(tokens: int, num_prefix: int, ratio: float, centres: int) -> None:
    x = tokens_of(2, tokens)
    scores = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    done = condense(x, scores, ratio, num_prefix, centres)
    y, size = tokred.merge(x, done.token_map, done.num_out, weight=done.weight, mode="sum")
    assert size.sum() == 2 * tokens
    for item in range(2):
        expected = by_hand(x[item], scores[item], ratio, num_prefix, centres)
        torch.testing.assert_close(y[item].double(), expected, rtol=1e-4, atol=1e-4)
    alone = condense(x[1:], scores[1:], ratio, num_prefix, centres)
    assert torch.equal(alone.token_map[0], done.token_map[1])
    assert torch.equal(alone.weight[0], done.weight[1])


def test_equal_tokens() -> None:
    """A token at no distance of its centre weighs 1: the mean of equal tokens is that token."""
    x = torch.ones(1, 21, 4)
    done = condense(x, torch.full((1, 21), 0.05), 0.9)
    y, _ = tokred.merge(x, done.token_map, done.num_out, weight=done.weight, mode="sum")
    assert torch.isfinite(y).all()
    kept, _, dropped = band_sizes(20, 0.9)
    torch.testing.assert_close(y[0, : 1 + kept], torch.ones(1 + kept, 4))
    torch.testing.assert_close(y[0, -1], torch.full((4,), 0.05 * dropped))


def test_half_precision() -> None:
    x = tokens_of(2, 41).bfloat16()
    scores = torch.rand(2, 41, generator=torch.Generator().manual_seed(1))
    done = condense(x, scores)
    y, _ = tokred.merge(x, done.token_map, done.num_out, weight=done.weight, mode="sum")
    for item in range(2):
        expected = by_hand(x[item], scores[item], 0.9, 1, 4)
        torch.testing.assert_close(y[item].double(), expected, rtol=2e-2, atol=2e-2)


def test_in_a_model() -> None:
    assert band_sizes(196, 0.9) == (137, 40, 19)
    check_in_a_model("tca_condensation", dict(ratio=1.0), dict(ratio=0.9), (37, 31, 25, 22))
    check_in_a_model(
        "tca_condensation", dict(ratio=1.0), dict(ratio=0.8, at=[1]), (36, 18), class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_refusals() -> None:
    for options, words in (
        (dict(ratio=0.0), r"ratio must be in \(0, 1\]"),
        (dict(centres=0), "centres must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            TcaCondensationOptions(**options)
