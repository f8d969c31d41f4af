"""VisPruner against its rounds in plain Python, and in the crops of an image."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from tokred.methods.vispruner import VisprunerOptions, select_tokens


def transcription(
    x: torch.Tensor,
    attention: torch.Tensor,
    valid: list[int],
    k: int,
    order: str,
    residual: str,
    important: float = 0.5,
) -> list[int]:
    ranked = best_of(attention.double().mean(0), len(valid), valid)
    first = int(k * important)
    kept, rest = ranked[:first], ranked[first:]
    unit = functional.normalize(x.double(), dim=-1)
    rest = sorted(rest) if residual == "position" else rest
    while (drop := min(8, len(rest) - (k - first), (len(rest) + 1) // 2)) > 0:
        even, odd = rest[::2], rest[1::2]
        likeness = {i: max([(unit[i] @ unit[j]).item() for j in odd], default=0) for i in even}
        left = sorted(even, key=lambda i: -likeness[i])[drop:]
        rest = [i for i in rest if i in left or i in odd] if residual == "position" else left + odd
    return sorted(kept + rest) if order == "position" else kept + rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("residual", "order", "k"),
    [*product(("score", "position"), ("position", "score"), (6, 17)), ("score", "position", 0)],
)
def test_picks(dtype: torch.dtype, residual: str, order: str, k: int) -> None:
    inputs = [tokens_of(3, 60).to(dtype), uniform(3, 4, 60).to(dtype)]
    options = dict(k=k, order=order, residual=residual)
    check_rows(select_tokens, transcription, inputs, padding(3, 60), **options)
    if k:
        check_rows(select_tokens, transcription, inputs, **options, important=0.2)


def test_more_than_there_are() -> None:
    x, attention = tokens_of(2, 9), uniform(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 2:] = False
    for order in ("position", "score"):
        found = select_tokens(x, attention, 12, valid, order)
        assert found.shape == (2, 12)
        assert [sorted(picked(row)) for row in found] == [[*range(9)], [0, 1]]


def test_in_crops() -> None:
    call = visual_call(tiling=(1, 2))
    kept = VisprunerOptions(keep=18, important=0.3).reduce_visual(call)
    attention, x = call.class_attention(-2), call.encoder_features
    for row in range(2):
        expected = []
        for crop in range(3):
            places = range(crop * 24, crop * 24 + 24)
            expected += transcription(
                x[row], attention[row], [*places], 6, "position", "score", 0.3
            )
        assert picked(kept[row]) == sorted(expected)


def test_refusals() -> None:
    x, attention = torch.ones(1, 4, 3), torch.ones(1, 4)
    for words, options in (
        ("important must be in", dict(important=1.5)),
        ("residual must be", dict(residual="none")),
        ("order must be", dict(order="best")),
    ):
        with pytest.raises(ValueError, match=words):
            select_tokens(x, attention, 2, **options)
    with pytest.raises(ValueError, match="important must be in"):
        VisprunerOptions(important=-0.1)
