"""Byte-pair encoding of a batch against the published loop on lists."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tokred.methods.dynamic_tokenization import batch_bpe, mean_embeddings

NUM_IDS = 6


def on_lists(rows: list[list[tuple[int, int]]], merges: int) -> tuple:
    """Rows of (token, word) -> (rows of (token, number of parts, word), pairs)."""
    rows = [[(token, 1, word) for token, word in row] for row in rows]
    done = []
    for new in range(NUM_IDS, NUM_IDS + merges):
        counts: dict[tuple[int, int], int] = {}
        for row in rows:
            for (a, _, left), (b, _, right) in pairwise(row):
                if left == right >= 0:
                    counts[a, b] = counts.get((a, b), 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: counts[pair])  # the first of equals
        done.append(best)
        for number, row in enumerate(rows):
            joined, i = [], 0
            while i < len(row):
                pair = row[i : i + 2]
                if (
                    len(pair) == 2
                    and (pair[0][0], pair[1][0]) == best
                    and pair[0][2] == pair[1][2] >= 0
                ):
                    joined.append((new, pair[0][1] + pair[1][1], pair[0][2]))
                    i += 2
                else:
                    joined.append(row[i])
                    i += 1
            rows[number] = joined
    return rows, done


def batch_of(seed: int, with_words: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3 if seed % 2 else NUM_IDS, (4, 24), generator=generator)
    for row, length in enumerate((24, 17, 0, 1)):
        ids[row, length:] = -1
    words = (
        torch.randint(-1, 2, (4, 24), generator=generator).sort(1).values if with_words else None
    )
    return ids, words


@pytest.mark.parametrize("with_words", (False, True))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("merges", (0, 1, 5, 100))
def test_merges(merges: int, seed: int, with_words: bool) -> None:
    ids, words = batch_of(seed, with_words)
    rows = [
        [
            (token, 0 if words is None else words[b, i].item())
            for i, token in enumerate(row)
            if token >= 0
        ]
        for b, row in enumerate(ids.tolist())
    ]
    expected, done = on_lists(rows, merges)
    found = batch_bpe(ids, merges, NUM_IDS, words)
    assert list(found.merges) == done
    assert found.lengths.tolist() == [len(row) for row in expected]
    for b, row in enumerate(expected):
        assert found.ids[b, : len(row)].tolist() == [token for token, _, _ in row]
        assert (found.ids[b, len(row) :] == -1).all()
        slots = [slot for slot, (_, parts, _) in enumerate(row) for _ in range(parts)]
        assert found.token_map[b].tolist() == slots + [-1] * (24 - len(slots))


def test_repeated_tokens_join_from_the_left() -> None:
    found = batch_bpe(torch.ones(1, 7, dtype=torch.int64), 1, NUM_IDS)
    assert found.ids[0].tolist() == [6, 6, 6, 1, -1, -1, -1]


def test_embeddings() -> None:
    ids = torch.tensor([[1, 2, 1, 2, 3], [1, 2, -1, -1, -1]])
    e = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found = batch_bpe(ids, 1, NUM_IDS)
    assert found.ids.tolist() == [[6, 6, 3, -1, -1], [6, -1, -1, -1, -1]]
    means = mean_embeddings(e, found)
    expected = torch.stack([e[0, :2].mean(0), e[0, 2:4].mean(0), e[0, 4]])
    torch.testing.assert_close(means[0, :3], expected)
    torch.testing.assert_close(means[1, 0], e[1, :2].mean(0))
    assert (means[0, 3:] == 0).all()


def test_refusals() -> None:
    for ids in ([[0, 6]], [[-1, 0]]):
        with pytest.raises(ValueError, match="ids must be below 6, and negative only at the end"):
            batch_bpe(torch.tensor(ids), 1, NUM_IDS)
    with pytest.raises(ValueError, match="merges must be at least 0, got -1"):
        batch_bpe(torch.zeros(1, 2, dtype=torch.int64), -1, NUM_IDS)
    with pytest.raises(ValueError, match=r"word_ids must be \[1, 2\], got \[1, 3\]"):
        batch_bpe(torch.zeros(1, 2, dtype=torch.int64), 1, NUM_IDS, torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match=r"ids must be integers \[B, N\], got \[2\]"):
        batch_bpe(torch.zeros(2), 1, NUM_IDS)
