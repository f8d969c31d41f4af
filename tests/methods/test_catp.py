"""CATP's two stages against greedy picks and scores in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from tokred.methods.catp import CatpOptions, growing_attention, select_tokens, text_relevance
from tokred.patching import PromptCall


def transcription(
    x: torch.Tensor, relevance: torch.Tensor, valid: list[int], k: int, trade_off: float
) -> list[int]:
    unit, r = functional.normalize(x[valid].double(), dim=-1), relevance[valid].double()
    cosine, weight, chosen = unit @ unit.T, (r - r.min()) / (r.max() - r.min()), []
    for _ in range(min(k, len(valid))):
        value = weight.clone()
        if chosen:
            value = trade_off * weight - (1 - trade_off) * cosine[:, chosen].amax(1)
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    return sorted(valid[i] for i in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "trade_off"), [(0, 0.5), (9, 0.3), (50, 0.8)])
def test_first_stage(dtype: torch.dtype, k: int, trade_off: float) -> None:
    x, text = tokens_of(3, 40).to(dtype), tokens_of(3, 6).to(dtype)
    words = padding(3, 6)
    relevance = text_relevance(x, text, words)
    for row in range(3):
        unit = functional.normalize(text[row, words[row]].double(), dim=-1)
        expected = (functional.normalize(x[row].double(), dim=-1) @ unit.T).amax(1)
        torch.testing.assert_close(relevance[row].double(), expected, rtol=1e-4, atol=1e-5)
    options = dict(k=k, trade_off=trade_off)
    check_rows(select_tokens, transcription, [x, relevance], padding(3, 40), **options)
    assert (text_relevance(x, text, torch.zeros_like(words)) == -1).all()


def expected_growth(
    before: torch.Tensor, after: torch.Tensor, x: torch.Tensor, trade_off: float
) -> torch.Tensor:
    unit = functional.normalize(x.double(), dim=-1)
    alike = ((unit @ unit.T).sum(1) - 1) / (len(x) - 1)
    parts = []
    for value in (after.double() - before.double(), alike):
        parts.append((value - value.min()) / (value.max() - value.min()))
    return trade_off * parts[0] + (1 - trade_off) * (1 - parts[1])


def test_second_stage_scores() -> None:
    before, after, x = uniform(2, 4, 30), uniform(2, 4, 30, seed=1), tokens_of(2, 30)
    valid = padding(2, 30)
    found = growing_attention(before, after, x, valid, 0.3)
    for row in range(2):
        v = valid[row]
        expected = expected_growth(before[row].mean(0)[v], after[row].mean(0)[v], x[row, v], 0.3)
        torch.testing.assert_close(found[row, v].double(), expected, rtol=1e-4, atol=1e-5)


def test_in_an_image() -> None:
    call = visual_call()
    kept = CatpOptions(keep=6, trade_off=0.4).reduce_visual(call)
    relevance = text_relevance(call.tokens, call.text)
    assert torch.equal(kept, select_tokens(call.tokens, relevance, 6, trade_off=0.4))
    call.text = None
    with pytest.raises(ValueError, match="catp reads the text of the prompt"):
        CatpOptions().reduce_visual(call)


def test_before_layers() -> None:
    torch.manual_seed(0)
    hidden, states = tokens_of(2, 12, 8), torch.randn(2, 2, 2, 2, 12, 4)
    slots = torch.tensor([[*range(2, 10)], [*range(4, 9), -1, -1, -1]], dtype=torch.int32)
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:10], visual[1, 4:9] = True, True
    method = CatpOptions(later_ratio=0.5)
    layers, carried = method.prune_layers(12), {}
    assert layers == [2, 4] and CatpOptions(later_ratio=1.0).prune_layers(12) == []
    maps = []
    for layer, (q, k) in zip(layers, states, strict=True):
        call = PromptCall(
            hidden, layer, 12, torch.ones(2, 12, dtype=torch.bool), visual, slots,
            torch.tensor([8, 5]), carried, previous=lambda q=q, k=k: (q, k), scale=0.5,
        )  # fmt: skip
        found = method.prune(call)
        assert (found is None) == (layer == 2)
        maps.append((q[:, :, -1:] @ k.mT * 0.5).softmax(-1)[:, :, 0].mean(1))
    for row, budget in enumerate((4, 3)):
        places = slots[row][slots[row] >= 0].long()
        scores = expected_growth(
            maps[0][row, places], maps[1][row, places], hidden[row, places], 0.5
        )
        assert picked(found[row]) == sorted(best_of(scores, budget, range(len(places))))


def test_refusals() -> None:
    for name, value in (("later_ratio", 0.0), ("trade_off", 2.0)):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            CatpOptions(**{name: value})
    with pytest.raises(ValueError, match="first_layer and last_layer must ascend"):
        CatpOptions(first_layer=5, last_layer=4).prune_layers(12)
    x = torch.ones(1, 4, 3)
    with pytest.raises(ValueError, match="trade_off must be in"):
        select_tokens(x, torch.ones(1, 4), 2, trade_off=-1)
    with pytest.raises(ValueError, match="trade_off must be in"):
        growing_attention(torch.ones(1, 4), torch.ones(1, 4), x, trade_off=-1)
