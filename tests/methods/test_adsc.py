"""ADSC's even distances, and its stages in a prompt."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import cut, picks_of, prompt_call
from tokred.methods.adsc import AdscOptions, evenly, every

pytestmark = pytest.mark.usefixtures("one_thread")


def test_strides() -> None:
    assert every(7, 3).tolist() == [0, 3, 6] and every(0, 2).tolist() == []
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        every(7, 0)


def test_even_distances() -> None:
    counts = [(12, 4), (12, 5), (7, 9), (0, 3), (5, 0)]
    count, k = torch.tensor(counts).T
    chosen = picks_of(evenly(count, k, 9))
    for picks, (n, wanted) in zip(chosen, counts, strict=True):
        wanted = min(n, wanted)
        assert picks == [i * n // wanted for i in range(wanted)]
        assert sorted({*picks}) == picks and all(p < n for p in picks)
    assert picks_of(evenly(count[:1], k[:1], 4)) == [every(12, 3).tolist()]


def test_stages_in_a_prompt() -> None:
    method = AdscOptions(ratio=0.25)
    call = prompt_call(layer=8, num_layers=32, visual=(24, 8, 0))
    chosen = method.prune(call)
    assert picks_of(chosen) == [list(range(0, 24, 2)), [0, 2, 4, 6], []]
    call = cut(call, chosen)
    call.layer = 16
    assert picks_of(method.prune(call)) == [list(range(0, 12, 2)), [0, 2], []]
    assert method.prune_layers(32) == [8, 16]
