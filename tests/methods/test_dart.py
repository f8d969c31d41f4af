"""DART against lists in plain Python, and before a layer of a language model."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, check_rows, padding, picked, uniform
from tokred.methods.dart import DartOptions, key_norms, select_tokens
from tokred.patching import PromptCall


def transcription(
    x: torch.Tensor,
    norms: torch.Tensor,
    valid: list[int],
    k: int,
    text: torch.Tensor | None = None,
    text_norms: torch.Tensor | None = None,
    words: list[int] = (),
    order: str = "position",
    pivots: int = 4,
    text_pivots: int = 4,
) -> list[int]:
    unit = functional.normalize(x.double(), dim=-1)
    chosen = best_of(norms, min(pivots, k), valid)
    rows = [unit[i] for i in chosen]
    if text is not None:
        best = best_of(text_norms, text_pivots, words)
        rows += [functional.normalize(text[i].double(), dim=0) for i in best]
    part = -(-(k - len(chosen)) // max(len(rows), 1))
    for row in rows:
        free = [i for i in valid if i not in chosen]
        chosen += best_of(-unit @ row, min(part, k - len(chosen)), free)
    return sorted(chosen) if order == "position" else chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "order", "pivots"),
    [*product((2, 13, 20, 60), ("position",), (4,)), (0, "score", 1), (14, "score", 5)],
)
def test_picks_of_an_image(dtype: torch.dtype, k: int, order: str, pivots: int) -> None:
    x, norms = tokens_of(3, 40).to(dtype), uniform(3, 40)
    options = dict(k=k, order=order, pivots=pivots)
    check_rows(select_tokens, transcription, [x, norms], padding(3, 40), **options)


@pytest.mark.parametrize("k", [3, 16, 25])
def test_picks_with_text(k: int) -> None:
    x, norms, text, text_norms = tokens_of(3, 40), uniform(3, 40), tokens_of(3, 9), uniform(3, 9)
    valid, words = padding(3, 40), padding(3, 9, seed=1)
    found = select_tokens(x, norms, k, text, text_norms, words, valid)
    budget = torch.tensor([k, k - 2, 40])
    of_rows = select_tokens(x, norms, budget, text, text_norms, words, valid)
    for row in range(3):
        inputs = (x[row], norms[row], valid[row].nonzero()[:, 0].tolist())
        there = words[row].nonzero()[:, 0].tolist()
        beside = (text[row], text_norms[row], there)
        assert picked(found[row]) == transcription(*inputs, k, *beside)
        assert picked(of_rows[row]) == transcription(*inputs, int(budget[row]), *beside)
    without = select_tokens(x, norms, k, text, text_norms, torch.zeros_like(words), valid)
    assert torch.equal(without, select_tokens(x, norms, k, valid=valid))


def test_key_norms() -> None:
    k = tokens_of(2, 15).view(2, 3, 5, 16)
    expected = k.transpose(1, 2).flatten(2).norm(p=1, dim=-1)
    torch.testing.assert_close(key_norms(k), expected)


def test_before_a_layer() -> None:
    """Two prompts, one of which has fewer visual tokens and padding on its left."""
    hidden, keys = tokens_of(2, 12, 8), torch.randn(2, 2, 12, 4)
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:10], visual[1, 4:9] = True, True
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :2] = False
    slots = torch.tensor([[*range(2, 10)], [*range(4, 9), -1, -1, -1]], dtype=torch.int32)
    call = PromptCall(
        hidden, 0, 3, valid, visual, slots, torch.tensor([8, 5]), following=lambda: (keys, keys)
    )
    norms = key_norms(keys)
    for options, budgets in ((dict(keep=4), (4, 4)), (dict(ratio=0.6), (5, 3))):
        method = DartOptions(pivots=1, text_pivots=2, **options)
        assert method.prune_layers(3) == [0]
        found = method.prune(call)
        for row, k in enumerate(budgets):
            places = slots[row][slots[row] >= 0].long()
            words = (valid & ~visual)[row].nonzero()[:, 0].tolist()
            expected = transcription(
                hidden[row, places], norms[row, places], [*range(len(places))], k,
                hidden[row], norms[row], words, pivots=1, text_pivots=2,
            )  # fmt: skip
            assert picked(found[row]) == expected


def test_refusals() -> None:
    x, norms = torch.ones(1, 4, 3), torch.ones(1, 4)
    with pytest.raises(ValueError, match="pivots and text_pivots must be at least 0"):
        select_tokens(x, norms, 2, pivots=0)
    with pytest.raises(ValueError, match="text_norms must be given"):
        select_tokens(x, norms, 2, x)
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 3"):
        DartOptions(layer=3).prune_layers(3)
    for name, smallest in (("pivots", 1), ("text_pivots", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least {smallest}"):
            DartOptions(**{name: -1})
