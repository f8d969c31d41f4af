"""DivPrune against greedy picks with the matrix of distances, and in an image's tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding, picked, visual_call
from tokred.methods.divprune import DivpruneOptions, select_tokens


def transcription(x: torch.Tensor, valid: list[int], k: int, order: str) -> list[int]:
    unit = functional.normalize(x[valid].double(), dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(torch.inf)
    chosen: list[int] = []
    nearest = distance.amin(1)
    for _ in range(min(k, len(valid))):
        if chosen:
            nearest = distance[:, chosen].amin(1)
            nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    picks = [valid[i] for i in chosen]
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("k", [0, 1, 8, 60])
def test_picks(dtype: torch.dtype, order: str, k: int) -> None:
    x = tokens_of(3, 48).to(dtype)
    check_rows(select_tokens, transcription, [x], padding(3, 48), k=k, order=order)


def test_duplicates_and_nan() -> None:
    assert select_tokens(torch.ones(1, 6, 4), 3).tolist() == [[0, 1, 2]]
    x = tokens_of(1, 6)
    x[0, 2] = torch.nan
    assert picked(select_tokens(x, 6)[0]) == [0, 1, 3, 4, 5]


def test_in_an_image() -> None:
    call = visual_call()
    kept = DivpruneOptions(ratio=0.3).reduce_visual(call)
    assert torch.equal(kept, select_tokens(call.tokens, 7))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"x must be \[B, N, C\], got \[4, 3\]"):
        select_tokens(torch.ones(4, 3), 2)
    with pytest.raises(ValueError, match="order must be"):
        select_tokens(torch.ones(1, 4, 3), 2, order="best")
