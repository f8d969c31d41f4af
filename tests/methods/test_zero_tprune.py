"""Zero-TPrune against PageRank on whole attention matrices, and in a model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.dropping import Layer, check_dropping
from cases.groups import check_in_a_model, tokens_of
from tokred.methods.zero_tprune import (
    ZeroTpruneOptions,
    importance,
    rounds,
    zero_tprune_plan,
)


def by_hand(
    ranks: Tensor, keys: Tensor, keep: int, similar: int, num_prefix: int, split: str
) -> list[int]:
    """The tokens of one item that stay, one after the other."""
    tokens = len(ranks)
    ranked = sorted(range(num_prefix, tokens), key=lambda i: (-ranks[i].item(), i))
    half = len(ranked) - len(ranked) // 2
    upper, lower = (ranked[:half], ranked[half:])
    if split == "alternate":
        upper, lower = ranked[0::2], ranked[1::2]
    unit = functional.normalize(keys.double(), dim=-1)
    nearest = {i: max((unit[i] @ unit[j]).item() for j in upper) for i in lower}
    gone = {*sorted(lower, key=lambda i: -nearest[i])[:similar]}
    left = [i for i in ranked if i not in gone][:keep]
    return [*range(num_prefix), *sorted(left)]


@pytest.mark.parametrize(
    ("tokens", "num_prefix", "similar", "split"),
    product((17, 24), (0, 1, 2), (0, 3, 6), ("sequential", "alternate")),
)
def test_tokens_that_stay(tokens: int, num_prefix: int, similar: int, split: str) -> None:
    keys = tokens_of(2, tokens)
    ranks = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    ranks[1, 3:9] = 0.5  # ties
    for dtype in (torch.float32, torch.bfloat16):
        rows = keys.to(dtype)
        kept = zero_tprune_plan(ranks, rows, 8, similar, num_prefix, split)
        assert kept.dtype == torch.int32
        for item in range(2):
            expected = by_hand(ranks[item], rows[item].float(), 8, similar, num_prefix, split)
            assert kept[item].tolist() == expected
            alone = zero_tprune_plan(
                ranks[item : item + 1], rows[item : item + 1], 8, similar, num_prefix, split
            )
            assert torch.equal(alone[0], kept[item])


def test_nan_and_equal_ranks() -> None:
    keys = tokens_of(1, 12)
    assert zero_tprune_plan(torch.ones(1, 12), keys, 5).tolist() == [[0, 1, 2, 3, 4]]
    ranks = torch.ones(1, 12)
    ranks[0, :3] = torch.nan
    assert zero_tprune_plan(ranks, keys, 5).tolist() == [[3, 4, 5, 6, 7]]
    assert zero_tprune_plan(torch.full((1, 12), torch.nan), keys, 12, 0).tolist() == [[*range(12)]]


def test_heads_that_count() -> None:
    """Even ranks, and those of a single token, are no ranking; if all are so, all count."""
    even, peak = torch.full((10,), 0.1), torch.eye(10)[3]
    good = torch.tensor([0.15, 0.05] * 5)
    ranks = torch.stack([torch.stack([even, good, peak]), torch.stack([even, peak, peak])])
    got = importance(ranks)
    torch.testing.assert_close(got[0], good)
    torch.testing.assert_close(got[1], ((even**2 + 2 * peak**2) / 3).sqrt())


def test_rounds() -> None:
    assert [rounds(layer, 12) for layer in (0, 2, 3, 8, 9, 11)] == [30, 30, 5, 5, 1, 1]


def chosen(layer: Layer) -> Tensor | None:
    """What the defaults choose in layers 1 and 2, by powers of the attention matrix."""
    if layer.number == 0:
        return None
    tokens = layer.x.shape[1]
    ranks = torch.full_like(layer.attention[:, :, :1], 1 / tokens)
    for _ in range(4):
        ranks = ranks @ layer.attention
    ranks = importance(ranks[:, :, 0])
    keep = int((tokens - 1) * 0.8)
    similar = int((tokens - 1 - keep) * 0.5)
    keys = layer.k.mean(1)
    rows = [by_hand(r, k, keep, similar, 1, "sequential") for r, k in zip(ranks, keys, strict=True)]
    return torch.tensor(rows)


def test_in_a_model() -> None:
    check_dropping("zero_tprune", dict(ratio=0.8, at=[1, 2], iterations=4), chosen)
    check_in_a_model("zero_tprune", dict(ratio=1.0), dict(ratio=0.75), (37, 28, 21, 16))
    check_in_a_model(
        "zero_tprune",
        dict(ratio=1.0),
        dict(ratio=0.5, at=[1]),
        (36, 18),
        class_token=False,
        global_pool="avg",
    )


def test_refusals() -> None:
    ranks, keys = torch.rand(1, 9), torch.randn(1, 9, 4)
    for keep, similar in ((10, 0), (-1, 0), (3, 5), (8, 2)):
        with pytest.raises(ValueError, match="keep must be from 0 to 9, and similar"):
            zero_tprune_plan(ranks, keys, keep, similar)
    for options, words in (
        (dict(ratio=0.0), r"ratio must be in \(0, 1\], got 0"),
        (dict(ratio=1.5), r"ratio must be in \(0, 1\], got 1.5"),
        (dict(similar_share=2.0), r"similar_share must be in \[0, 1\]"),
        (dict(iterations=0), "iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            ZeroTpruneOptions(**options)
    with pytest.raises(ValueError, match="at must list layers from 0 to 2, got 3"):
        ZeroTpruneOptions(at=[1, 3]).layers(3)
