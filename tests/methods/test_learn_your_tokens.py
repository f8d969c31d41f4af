"""Attention within words and their pooling against masks and loops."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.methods.learn_your_tokens import pool_words, word_attention, word_starts

IDS = torch.tensor([[3, 3, 3, -1, 4, 4, -1, -1, 5], [1, 1, 1, 1, 1, 1, 1, 1, 2]])
STARTS = [[0, 0, 0, 3, 4, 4, 6, 7, 8], [0] * 8 + [8]]


def test_starts() -> None:
    assert word_starts(IDS).tolist() == STARTS


@pytest.mark.parametrize("longest", (None, 8, 3))
def test_attention_within_words(longest: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 9, 8, generator=generator)
    place = torch.arange(9)
    starts = torch.tensor(STARTS)[:, :, None]
    seen = (place >= starts) & (place <= place[:, None])
    seen &= place > place[:, None] - (longest or 9)
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(word_attention(q, k, v, IDS, longest), expected)


@pytest.mark.parametrize("scored", (False, True))
def test_words(scored: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    h, score = torch.randn(2, 9, 4, generator=generator), torch.randn(2, 9, generator=generator)
    words, lengths, token_map = pool_words(h, IDS, score if scored else None)
    assert lengths.tolist() == [6, 2]
    for item, row in enumerate(STARTS):
        for slot, start in enumerate(sorted(set(row))):
            tokens = [t for t in range(9) if row[t] == start]
            weight = score[item, tokens].softmax(0)[:, None]
            expected = (weight * h[item, tokens]).sum(0) if scored else h[item, tokens[-1]]
            torch.testing.assert_close(words[item, slot], expected)
            assert torch.equal(tokred.unmerge(words, token_map)[item, start], words[item, slot])
    assert pool_words(h, IDS, capacity=3)[1].tolist() == [3, 2]


def test_refusals() -> None:
    x = torch.zeros(1, 1, 9, 8)
    with pytest.raises(ValueError, match="longest must be at least 1, got 0"):
        word_attention(x, x, x, IDS[:1], 0)
