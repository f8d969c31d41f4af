"""LRS-VQA's thresholds, budgets and tiles, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokred.methods.lrs_vqa import above, pruned, text_attention, tiles_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 4, 1, 8).to(dtype), torch.randn(2, 2, 20, 8).to(dtype)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5
    expected = logits.softmax(-1)[:, :, 0, 3:15].mean(1)
    given = text_attention(q, k, slice(3, 15))
    torch.testing.assert_close(given.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_thresholds(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(3, tokens, generator=generator) ** 3
    valid = torch.rand(3, tokens, generator=generator) < 0.8
    valid[0] = True
    for threshold in (0.1, 0.2, 1.0):
        given = above(scores, threshold, valid)
        for item in range(3):
            there = valid[item].nonzero()[:, 0].tolist()
            expected = []
            if there:
                low, high = np.percentile(scores[item, there].numpy(), [5, 95])
                unit = [
                    (scores[item, i].item() - low) / (high - low) if high > low else 0
                    for i in there
                ]
                expected = [
                    i for i, u in zip(there, unit, strict=True) if min(max(u, 0), 1) > threshold
                ]
            assert given[item].nonzero()[:, 0].tolist() == expected
    assert not above(torch.ones(1, 5)).any()


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 1.0])
def test_budgets(ratio: float) -> None:
    scores = torch.rand(3, 30, generator=torch.Generator().manual_seed(3))
    scores[1] = scores[1].round(decimals=1)
    newline = torch.arange(30).expand(3, 30) % 6 == 5
    valid = (torch.arange(30) < torch.tensor([[30], [17], [0]])) & ~newline
    given = pruned(scores, ratio, valid, newline)
    for item in range(3):
        there = valid[item].nonzero()[:, 0].tolist()
        best = sorted(there, key=lambda i: (-scores[item, i].item(), i))
        expected = {*best[: int(round(len(there) * ratio, 9))], *range(5, 30, 6)}
        assert {*given[item].nonzero()[:, 0].tolist()} == expected
    assert torch.equal(pruned(scores, ratio), pruned(scores, ratio, torch.ones_like(valid)))


def test_tiles() -> None:
    selected = torch.rand(2, 24) < 0.2
    for tiles in ((2, 2), (3, 4), (5, 7), (1, 1)):
        given = tiles_of(selected, (4, 6), tiles)
        for item in range(2):
            expected = {
                (i // 6 * tiles[0] // 4) * tiles[1] + i % 6 * tiles[1] // 6
                for i in selected[item].nonzero()[:, 0].tolist()
            }
            assert {*given[item].nonzero()[:, 0].tolist()} == expected


def test_refusals() -> None:
    scores = torch.rand(1, 6)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 2"):
        above(scores, 2.0)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 1.5"):
        pruned(scores, 1.5)
    with pytest.raises(ValueError, match="grid must have 6 tokens, got 2 x 2"):
        tiles_of(scores > 0, (2, 2), (2, 2))
    with pytest.raises(ValueError, match="tiles must be at least 1, got 0"):
        tiles_of(scores > 0, (2, 3), (0, 2))
