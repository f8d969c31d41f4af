"""Token correlation's densities and picks against the matrix of cosines, and in crops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, picked, uniform, visual_call
from tokred.methods.token_correlation import (
    TokenCorrelationOptions,
    information_density,
    select_tokens,
)


def density(keys: torch.Tensor, valid: torch.Tensor, threshold: float, neighbours: int) -> float:
    here = valid.nonzero()[:, 0]
    unit = functional.normalize(keys[here].double(), dim=-1)
    count = ((unit @ unit.T).fill_diagonal_(-2) > threshold).sum(1)
    return (count < neighbours).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_density(dtype: torch.dtype, threshold: float) -> None:
    keys = tokens_of(3, 40).to(dtype)
    valid = uniform(3, 40) < 0.8
    found = information_density(keys, threshold, 3, valid)
    expected = [density(keys[row], valid[row], threshold, 3) for row in range(3)]
    assert found.tolist() == pytest.approx(expected)
    assert information_density(keys, threshold, 3, torch.zeros_like(valid)).tolist() == [0] * 3


def transcription(
    keys: torch.Tensor,
    late: torch.Tensor,
    early: torch.Tensor,
    valid: torch.Tensor,
    k: int,
    share: float,
) -> list[int]:
    """The picks of one image whose crops can use their parts."""
    weight = [density(*rows, 0.8, 2) for rows in zip(keys, valid, strict=True)]
    parts = [w * k / sum(weight) for w in weight]
    counts = [math.floor(p) for p in parts]
    for crop in sorted(range(len(parts)), key=lambda c: -(parts[c] % 1))[: k - sum(counts)]:
        counts[crop] += 1
    picks = []
    for crop, count in enumerate(counts):
        here = valid[crop].nonzero()[:, 0].tolist()
        first = best_of(late[crop], math.floor(count * share), here)
        rest = [i for i in here if i not in first]
        both = first + best_of(early[crop], count - len(first), rest)
        picks += [crop * keys.shape[1] + i for i in sorted(both)]
    return picks


@pytest.mark.parametrize(("k", "share"), [(0, 0.5), (20, 0.5), (25, 0.0), (25, 1.0)])
def test_picks(k: int, share: float) -> None:
    keys, late, early = tokens_of(6, 40), uniform(6, 40), uniform(6, 40, seed=1)
    valid = uniform(6, 40, seed=2) < 0.9
    options = dict(threshold=0.8, neighbours=2, global_share=share)
    found = select_tokens(keys, late, early, k, 3, valid, **options)
    for row in range(2):
        of = slice(row * 3, row * 3 + 3)
        assert picked(found[row]) == transcription(
            keys[of], late[of], early[of], valid[of], k, share
        )
        alone = select_tokens(keys[of], late[of], early[of], k, 3, valid[of], **options)
        assert torch.equal(alone[0], found[row])
    ranked = select_tokens(keys, late, early, k, 3, valid, "score", **options)
    assert [sorted(picked(r)) for r in ranked] == [picked(r) for r in found]


def test_everything() -> None:
    keys, map_ = tokens_of(2, 9), uniform(2, 9)
    assert picked(select_tokens(keys, map_, map_, 30, 2)[0]) == [*range(18)]


def test_in_crops() -> None:
    call = visual_call(tiling=(1, 2))
    options = dict(threshold=0.8, neighbours=2)
    kept = TokenCorrelationOptions(keep=18, **options).reduce_visual(call)
    keys = call.keys(-2).transpose(1, 2).flatten(2).view(2, 3, 24, -1)
    late, early = (call.class_attention(i).mean(1).view(2, 3, 24) for i in (-2, 0))
    valid = torch.ones(3, 24, dtype=torch.bool)
    for row in range(2):
        inputs = keys[row], late[row], early[row], valid
        assert picked(kept[row]) == transcription(*inputs, 18, 0.5)


def test_refusals() -> None:
    keys, map_ = torch.ones(3, 4, 2), torch.ones(3, 4)
    with pytest.raises(ValueError, match="crops must divide the 3 rows of keys, got 2"):
        select_tokens(keys, map_, map_, 2, 2)
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        information_density(keys, 0.5, 0)
    for name, value in (("global_share", 1.5), ("neighbours", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            TokenCorrelationOptions(**{name: value})
