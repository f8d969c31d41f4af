"""Attention debiasing against sorts in plain Python, and before a layer of a language model."""

from __future__ import annotations

import pytest
import torch

from cases.selection import best_of, check_rows, padding, picked, uniform
from tokred.methods.attention_debiasing import (
    AttentionDebiasingOptions,
    content_mask,
    debiased,
    fit_trend,
    position_trend,
    select_tokens,
)
from tokred.patching import PromptCall


def trend_of(tokens: int) -> list[float]:
    places = [i * 575 / max(tokens - 1, 1) for i in range(tokens)]
    return [2.56911e-8 * i**3 - 1.45979e-5 * i**2 + 3.01520e-3 * i + 1 for i in places]


def transcription(
    attention: torch.Tensor, valid: list[int], k: int, order: str = "position"
) -> list[int]:
    trend = torch.tensor(trend_of(attention.shape[1]), dtype=torch.float64)
    picks = best_of(attention.double().mean(0) / trend, k, valid)
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "order"), [(0, "score"), (9, "position"), (60, "score")])
def test_picks(dtype: torch.dtype, k: int, order: str) -> None:
    attention = uniform(3, 4, 40).to(dtype)
    check_rows(select_tokens, transcription, [attention], padding(3, 40), k=k, order=order)


def test_trend() -> None:
    trend = position_trend(576)[0]
    assert trend[0] == 1 and 1 / trend[575] == pytest.approx(0.35824, abs=1e-4)
    torch.testing.assert_close(position_trend(9)[0], torch.tensor(trend_of(9)))
    rows = position_trend(9, torch.tensor([5, 9]))
    torch.testing.assert_close(rows[0, :5], torch.tensor(trend_of(5)))
    samples = 0.3 * trend + 0.01 * torch.randn(400, 576, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fit_trend(samples), trend, rtol=0.05, atol=0.05)


def test_letter_boxes() -> None:
    """In a wide image with fewer patches than k only these are kept."""
    attention = uniform(2, 576) + 0.1
    content = torch.stack([content_mask(size, (24, 24)) for size in ((1000, 80), (300, 300))])
    found = select_tokens(attention, 64, content=content)
    assert picked(found[0]) == content[0].nonzero()[:, 0].tolist() and len(picked(found[0])) < 64
    assert picked(found[1]) == transcription(attention[1, None], [*range(576)], 64)
    assert (debiased(attention, content=content)[0][~content[0]] == 0).all()


def test_before_a_layer() -> None:
    """Two prompts, one of which has fewer visual tokens."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 2, 12, 4)
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[0, 2:10], visual[1, 4:9] = True, True
    slots = torch.tensor([[*range(2, 10)], [*range(4, 9), -1, -1, -1]], dtype=torch.int32)
    call = PromptCall(
        torch.randn(2, 12, 8), 2, 4, torch.ones(2, 12, dtype=torch.bool), visual, slots,
        torch.tensor([8, 5]), previous=lambda: (q, k), scale=0.5,
    )  # fmt: skip
    attention = (q[:, :, -1:] @ k.mT * 0.5).softmax(-1)[:, :, 0]
    for options, budgets in ((dict(keep=4), (4, 4)), (dict(ratio=0.5), (4, 2))):
        found = AttentionDebiasingOptions(**options).prune(call)
        for row, budget in enumerate(budgets):
            places = slots[row][slots[row] >= 0].long()
            inside = attention[row][:, places]
            assert picked(found[row]) == transcription(inside, [*range(len(places))], budget)
    assert AttentionDebiasingOptions().prune_layers(32) == [2]
    assert AttentionDebiasingOptions().prune_layers(2) == [1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="layer must be at least 1, got 0"):
        AttentionDebiasingOptions(layer=0)
    with pytest.raises(ValueError, match="layer must be from 1 to 3, got 4"):
        AttentionDebiasingOptions(layer=4).prune_layers(4)
    with pytest.raises(ValueError, match="scores must be"):
        fit_trend(torch.ones(2, 3))
