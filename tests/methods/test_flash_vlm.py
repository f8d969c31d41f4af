"""FlashVLM's scores and rounds against plain torch row by row, and in the crops of an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from tokred.methods.flash_vlm import FlashVlmOptions, fused_scores, select_tokens, text_similarity


def between(values: torch.Tensor) -> torch.Tensor:
    return (values - values.min()) / (values.max() - values.min() + 1e-6)


def expected_scores(
    x: torch.Tensor, text: torch.Tensor, attention: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of one row without padding: the similarity to the text, and the fused scores."""
    cosine = (
        functional.normalize(x.double(), dim=-1) @ functional.normalize(text.double(), dim=-1).T
    )
    similar = (cosine * (cosine / 0.05).softmax(1)).sum(1)
    sharp = between((similar / 0.01).softmax(0) ** 2.5)
    threshold = np.quantile(sharp.numpy(), 0.995)
    sharp = between(torch.where(sharp < threshold, sharp * 0.1, sharp))
    salient = between(attention.double().mean(0)).clamp(min=1e-6)
    return sharp, between(((1 - eta) * salient.log() + eta * sharp.clamp(min=1e-6).log()).exp())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores(eta: float, dtype: torch.dtype) -> None:
    x, text = tokens_of(3, 40).to(dtype), tokens_of(3, 6).to(dtype)
    attention = uniform(3, 4, 40).to(dtype)
    valid, words = padding(3, 40), padding(3, 6, seed=1)
    similar = text_similarity(x, text, words, valid)
    fused = fused_scores(attention, similar, valid, eta)
    for row in range(3):
        v = valid[row]
        sharp, expected = expected_scores(
            x[row, v], text[row, words[row]], attention[row][:, v], eta
        )
        close = dict(rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(similar[row, v].double(), sharp, **close)
        torch.testing.assert_close(fused[row, v].double(), expected, **close)


def transcription(
    x: torch.Tensor, scores: torch.Tensor, valid: list[int], k: int, order: str
) -> list[int]:
    ranked = best_of(scores, len(valid), valid)
    first = int(k / 2)
    unit, rest = functional.normalize(x.double(), dim=-1), ranked[first:]
    while (drop := min(8, len(rest) - (k - first), (len(rest) + 1) // 2)) > 0:
        even, odd = rest[::2], rest[1::2]
        likeness = {i: max((unit[i] @ unit[j]).item() for j in odd) for i in even}
        rest = sorted(even, key=lambda i: -likeness[i])[drop:] + odd
    picks = ranked[:first] + rest
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "order"), [(7, "position"), (16, "score")])
def test_picks(dtype: torch.dtype, k: int, order: str) -> None:
    inputs = [tokens_of(3, 60).to(dtype), uniform(3, 60)]
    check_rows(select_tokens, transcription, inputs, padding(3, 60), k=k, order=order)


def test_in_crops() -> None:
    call = visual_call(tiling=(1, 2), text=4)
    call.text_mask[1, 2:] = False
    kept = FlashVlmOptions(keep=21, eta=0.3).reduce_visual(call)
    attention = call.class_attention(-2)
    for row in range(2):
        expected = []
        for crop in range(3):
            part = slice(crop * 24, crop * 24 + 24)
            text = call.text[row, call.text_mask[row]]
            _, scores = expected_scores(call.tokens[row, part], text, attention[row, :, part], 0.3)
            x = call.encoder_features[row, part]
            picks = transcription(x, scores, [*range(24)], 7, "position")
            expected += [i + crop * 24 for i in picks]
        assert picked(kept[row]) == expected


def test_without_words() -> None:
    """All tokens resemble the text alike, so the attention decides."""
    x, text = tokens_of(1, 9), torch.zeros(1, 0, 16)
    assert text_similarity(x, text).isfinite().all()
    masked = text_similarity(x, tokens_of(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    attention = uniform(1, 9)
    scores = fused_scores(attention, masked)
    assert scores.argmax() == attention.argmax() and scores.isfinite().all()


def test_refusals() -> None:
    call = visual_call()
    call.text = None
    with pytest.raises(ValueError, match="flash_vlm reads the text of the prompt"):
        FlashVlmOptions().reduce_visual(call)
    with pytest.raises(ValueError, match="eta must be in"):
        FlashVlmOptions(eta=2.0)
    with pytest.raises(ValueError, match="eta must be in"):
        fused_scores(torch.ones(1, 3), torch.ones(1, 3), eta=-1)
    with pytest.raises(ValueError, match=r"text must be \[1, N, C\]"):
        text_similarity(torch.ones(1, 3, 4), torch.ones(2, 3, 4))
