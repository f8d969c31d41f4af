"""IDPruner against greedy picks with the matrix of cosines, and in an image's tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding, picked, uniform, visual_call
from tokred.methods.idpruner import IdprunerOptions, select_tokens


def transcription(
    x: torch.Tensor,
    scores: torch.Tensor,
    valid: list[int],
    k: int,
    order: str = "position",
    trade_off: float = 0.5,
) -> list[int]:
    unit = functional.normalize(x[valid].double(), dim=-1)
    cosine, s = unit @ unit.T, scores[valid].double()
    importance = (s - s.min()) / (s.max() - s.min() + 1e-6)
    likeness = torch.full((len(valid),), -2.0, dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(min(k, len(valid))):
        value = (
            trade_off * importance - (1 - trade_off) * likeness if chosen else importance.clone()
        )
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
        likeness = torch.maximum(likeness, cosine[chosen[-1]])
    picks = [valid[i] for i in chosen]
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trade_off", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("k", "order"), [(0, "score"), (9, "position"), (60, "score")])
def test_picks(dtype: torch.dtype, trade_off: float, k: int, order: str) -> None:
    x, scores = tokens_of(3, 40).to(dtype), uniform(3, 40)
    options = dict(k=k, order=order, trade_off=trade_off)
    check_rows(select_tokens, transcription, [x, scores], padding(3, 40), **options)


def test_equal_scores_and_nan() -> None:
    x = tokens_of(1, 12)
    picks = select_tokens(x, torch.full((1, 12), 3.0), 4, order="score")
    assert picks[0].tolist() == transcription(x[0], torch.ones(12), [*range(12)], 4, "score")
    scores = uniform(1, 12)
    scores[0, 5] = torch.nan
    assert picked(select_tokens(x, scores, 12)[0]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_in_an_image() -> None:
    call = visual_call()
    kept = IdprunerOptions(keep=6, trade_off=0.3).reduce_visual(call)
    attention = call.class_attention(-2).mean(1)
    assert torch.equal(kept, select_tokens(call.tokens, attention, 6, trade_off=0.3))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="trade_off must be in"):
        select_tokens(torch.ones(1, 4, 3), torch.ones(1, 4), 2, trade_off=1.1)
    with pytest.raises(ValueError, match="trade_off must be in"):
        IdprunerOptions(trade_off=-1)
