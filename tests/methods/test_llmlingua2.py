"""LLMLingua-2's words, percentiles and chunks against numpy, word by word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokred.methods.llmlingua2 import (
    keep_chunks,
    keep_tokens,
    keep_words,
    weighted_percentile,
    word_probabilities,
)


def draw(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    probability = torch.rand(2, tokens, generator=generator)
    starts = torch.rand(2, tokens, generator=generator) < 0.6
    force = torch.rand(2, tokens, generator=generator) < 0.1
    valid = torch.arange(tokens) < torch.tensor([[tokens], [max(tokens - 5, 1)]])
    return probability, starts, force, valid


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("reduce", ["mean", "first"])
def test_words(tokens: int, reduce: str) -> None:
    probability, starts, force, valid = draw(tokens)
    words, word = word_probabilities(probability, starts, valid, force, reduce)
    for item in range(2):
        members: list[list[int]] = []
        for i in range(int(valid[item].sum())):
            if starts[item, i] or not members:
                members.append([])
            members[-1].append(i)
            assert word[item, i] == len(members) - 1
        assert (word[item, int(valid[item].sum()) :] == -1).all()
        for number, group in enumerate(members):
            p = probability[item, group].double()
            expected = float(p.mean() if reduce == "mean" else p[0])
            expected = 1.0 if force[item, group].any() else expected
            assert words[item, number].item() == pytest.approx(expected, abs=1e-6)
        assert not words[item, len(members) :].any()


def test_percentile() -> None:
    """numpy's percentile of numbers with repeats, exact where it is one of them."""
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        values = generator.random((3, size)).round(2)
        count = generator.integers(0, 4, (3, size))
        count[:, 0] += 1
        for q in (0, 1, 37, 50, 99, 100):
            given = weighted_percentile(torch.tensor(values), torch.tensor(count), q)
            for item in range(3):
                listed = np.repeat(values[item], count[item])
                assert given[item].item() == np.percentile(listed, q)
    assert weighted_percentile(torch.rand(1, 4), torch.zeros(1, 4).long(), 50).isnan().all()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.33, 0.5, 1.0])
def test_words_that_stay(rate: float) -> None:
    probability, starts, force, valid = draw(40)
    words, word = word_probabilities(probability, starts, valid, force)
    number = word.amax(1, keepdim=True) + 1
    count = torch.randint(1, 4, words.shape) * (torch.arange(40) < number)
    keep = keep_words(words, count, rate)
    kept = keep_tokens(keep, word)
    for item in range(2):
        listed = np.repeat(words[item].double().numpy(), count[item].numpy())
        threshold = np.percentile(listed, min(int(100 * (1 - rate) + 1), 100))
        expected = [
            w for w in range(int(number[item]))
            if words[item, w].item() > threshold or words[item, w].item() == 1.0 == threshold
        ]  # fmt: skip
        assert keep[item].nonzero()[:, 0].tolist() == expected
        tokens = [i for i in range(40) if word[item, i].item() in expected]
        assert kept[item].tolist() == tokens + [-1] * (40 - len(tokens))


def test_equal_probabilities() -> None:
    """None is above its own percentile; words that are forced stay all the same."""
    count = torch.ones(1, 5).long()
    assert not keep_words(torch.full((1, 5), 0.5), count, 0.5).any()
    assert keep_words(torch.ones(1, 5), count, 0.5).all()
    assert not keep_words(torch.full((1, 5), torch.nan), count, 0.5).any()


def test_chunks() -> None:
    probability = torch.rand(2, 30)
    chunk = (torch.arange(30) // 6).repeat(2, 1).int()
    chunk[1, 24:] = -1
    for rate in (0.0, 0.3, 0.9):
        keep = keep_chunks(probability, chunk, 6, rate)
        for item in range(2):
            numbers = [n for n in range(6) if (chunk[item] == n).any()]
            means = [probability[item][chunk[item] == n].mean().item() for n in numbers]
            threshold = np.percentile(means, int(100 * (1 - (rate + 1) / 2)))
            expected = [n for n, m in zip(numbers, means, strict=True) if m >= threshold - 1e-7]
            assert keep[item].nonzero()[:, 0].tolist() == expected


def test_refusals() -> None:
    words, count = torch.rand(1, 3), torch.ones(1, 3).long()
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
            keep_words(words, count, rate)
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
            keep_chunks(words, count.int(), 2, rate)
    with pytest.raises(ValueError, match=r"q must be in \[0, 100\], got 101"):
        weighted_percentile(words, count, 101)
    with pytest.raises(ValueError, match='reduce must be "mean" or "first"'):
        word_probabilities(words, count.bool(), reduce="max")
