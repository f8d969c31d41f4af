"""Schedules of kept tokens, the search for the smallest of them, and P-Sigmoid in a prompt."""

from __future__ import annotations

import itertools
import math

import pytest

from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from tokred.methods.g_search import GSearchOptions, greedy_search
from tokred.methods.pyramid_drop import pyramid_counts
from tokred.schedule import keep_schedule


def test_schedules() -> None:
    assert keep_schedule(6, 100, 20) == [100, 100, 80, 60, 40, 20]
    assert keep_schedule(4, 10, 10) == [10] * 4 and keep_schedule(3, 9, 0, first=3) == [9] * 3
    sigmoid = keep_schedule(9, 1000, 100, "sigmoid", first=0, centre=0.25, width=0.2)
    for layer, kept in enumerate(sigmoid):
        share = 1 / (1 + math.exp((layer / 8 - 0.25) / 0.2))
        assert kept == int(100 + 900 * share + 1e-9)
    pyramid = keep_schedule(32, 576, 72, "pyramid")
    counts = [576, *pyramid_counts(576)]
    assert pyramid == [count for count in counts for _ in range(8)]
    for kind in ("linear", "sigmoid", "pyramid"):
        kept = keep_schedule(24, 333, 7, kind)
        assert all(a >= b for a, b in itertools.pairwise(kept)) and len(kept) == 24


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(end=11), "end must be from 0 to 10 tokens, got 11"),
        (dict(first=5), "first must be one of 4 layers, got 5"),
        (dict(kind="sigmoid", width=0), "width must be above 0, got 0"),
        (dict(kind="pyramid", stages=0), "stages must be at least 1, got 0"),
        (dict(kind="steps"), 'kind must be "linear", "sigmoid" or "pyramid"'),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        keep_schedule(**{"num_layers": 4, "tokens": 10, "end": 2, **options})


def test_search_finds_the_smallest() -> None:
    """The smallest of all schedules that never grow, by trying them all."""
    needed = (4, 3, 3, 1)

    def good(kept: list[int]) -> bool:
        return all(k >= n for k, n in zip(kept, needed, strict=True))

    assert greedy_search(good, 4, 5, first=0) == [4, 3, 3, 1]
    assert greedy_search(good, 4, 5) == [5, 3, 3, 1]
    calls = []
    greedy_search(lambda kept: bool(calls.append(kept)) or good(kept), 4, 4096)
    assert len(calls) <= 4 * 12
    assert greedy_search(lambda kept: False, 3, 7) == [7, 7, 7]

    def total(kept: list[int]) -> bool:  # a model that needs tokens in all, not by layer
        return sum(kept) >= 9

    found = greedy_search(total, 4, 5, first=0)
    schedules = itertools.product(range(6), repeat=4)
    allowed = [
        s for s in schedules if all(a >= b for a, b in itertools.pairwise(s)) and sum(s) >= 9
    ]
    assert tuple(found) == min(allowed)
    with pytest.raises(ValueError, match="first must be one of 4 layers, got 5"):
        greedy_search(good, 4, 5, first=5)


@pytest.mark.parametrize("kind", ["sigmoid", "linear"])
def test_every_layer_of_a_prompt(kind: str) -> None:
    method = GSearchOptions(ratio=0.25, kind=kind)
    assert method.prune_layers(5) == [1, 2, 3, 4]
    call = prompt_call(num_layers=5)
    for stage, layer in enumerate((1, 2, 3, 4)):
        call.layer = layer
        depth = stage / 3
        share = 1 - depth if kind == "linear" else 1 / (1 + math.exp((depth - 0.3) / 0.1))
        row, wanted = attention_of(call, "previous")[:, :, -1].mean(1).float(), []
        for item, count in enumerate((24, 17, 0)):
            slots = [s for s in call.slots[item].tolist() if s >= 0]
            left = int(0.25 * count + 0.75 * count * share + 1e-7)
            wanted.append(ranked(row[item, slots].tolist(), left))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)
    with pytest.raises(ValueError, match="width must be above 0, got 0"):
        GSearchOptions(width=0)
