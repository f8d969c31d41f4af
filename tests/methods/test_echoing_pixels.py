"""EchoingPixels' score and its one budget for all kinds of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tokred.methods.echoing_pixels import gather, pooled_keep, token_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(16, eps=1e-6)
    norm.weight.data.uniform_(0.5, 1.5)
    layers = nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 1))
    h = torch.randn(2, 11, 16).to(dtype)
    with torch.no_grad():
        expected = layers(norm(h.float()))[..., 0]
        first, second = ((layers[i].weight, layers[i].bias) for i in (0, 2))
        given = token_scores(h, norm.weight, first, second)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5, 1.0])
def test_budget(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 40, generator=generator)
    scores[1] = scores[1].round()  # ties
    kind = torch.randint(3, (3, 40), generator=generator)  # text, sound, video
    valid = torch.arange(40) < torch.tensor([[40], [29], [40]])
    kind[2] = 0
    for only_video in (False, True):
        candidates = kind == 2 if only_video else kind > 0
        kept = pooled_keep(scores, candidates, ratio, valid, kind > 0)
        for item in range(3):
            there = valid[item].nonzero()[:, 0].tolist()
            counted = sum(kind[item, i].item() > 0 for i in there)
            budget = max(1, math.ceil(round(counted * ratio, 6)))
            may = [i for i in there if candidates[item, i]]
            best = sorted(may, key=lambda i: (-scores[item, i].item(), i))[:budget]
            expected = sorted([*best, *(i for i in there if not candidates[item, i])])
            assert kept[item].tolist() == expected + [-1] * (40 - len(expected))


def test_gather() -> None:
    h, positions = torch.randn(2, 6, 4), torch.arange(6).repeat(2, 4, 1)[..., None]
    kept = torch.tensor([[0, 5], [3, -1]], dtype=torch.int32)
    hidden, places = gather([h, positions], kept, [1, 2])
    assert torch.equal(hidden[0], h[0, [0, 5]]) and torch.equal(hidden[1, 0], h[1, 3])
    assert places[0, :, :, 0].tolist() == [[0, 5]] * 4 and not hidden[1, 1].any()


def test_nan_and_refusals() -> None:
    scores = torch.tensor([[torch.nan, 1.0, torch.nan, 0.5]])
    every = torch.ones(1, 4, dtype=torch.bool)
    assert pooled_keep(scores, every, 0.5).tolist() == [[1, 3, -1, -1]]
    assert pooled_keep(scores, ~every, 0.5).tolist() == [[0, 1, 2, 3]]
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            pooled_keep(scores, every, ratio)
