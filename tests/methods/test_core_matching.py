"""CoreMatching's counts and elbow against the product of activations in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from cases.selection import best_of, check_rows, padding, uniform
from tokred.methods.core_matching import activations, coactivation, select_tokens


@pytest.mark.parametrize("neurons", [0, 1, 8, 61, 2048, 5000])
def test_counts(neurons: int) -> None:
    """Of more neurons than 255 words of 64 bits hold, and of all of them."""
    active = uniform(2, 9, neurons) < 0.7
    found = coactivation(active[:, 0], active[:, 1:])
    together = active.double() @ active.double().mT
    assert torch.equal(found.double(), together[:, 0, 1:])
    everything = torch.ones(1, 3, neurons, dtype=torch.bool)
    assert (coactivation(everything[:, 0], everything) == neurons).all()


def test_activations() -> None:
    gate, up = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(activations(gate, up), functional.silu(gate) * up > 0)


def transcription(
    scores: torch.Tensor, valid: list[int], order: str = "position", k: int | None = None
) -> list[int]:
    falling = sorted((scores[i].item() for i in valid), reverse=True)
    last, drop = len(falling) - 1, falling[0] - falling[-1]
    away = [abs(-drop * r - last * (v - falling[0])) for r, v in enumerate(falling)]
    threshold = falling[int(np.argmax(away))]
    above = [i for i in valid if scores[i] > threshold]
    picks = best_of(scores, len(above) if k is None else k, above)
    return sorted(picks) if order == "position" else picks


@pytest.mark.parametrize(("k", "order"), [(None, "position"), (None, "score"), (3, "position")])
def test_picks(k: int | None, order: str) -> None:
    """Many of the whole numbers are equal."""
    scores = (uniform(4, 40).pow(3) * 30).round()
    check_rows(select_tokens, transcription, [scores], padding(4, 40), k=k, order=order)


def test_equal_scores() -> None:
    assert (select_tokens(torch.full((2, 5), 7.0)) == -1).all()


def test_refusals() -> None:
    active = torch.ones(2, 4, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"word must be \[2, 16\] in torch.bool"):
        coactivation(active[:, 0].float(), active)
    with pytest.raises(ValueError, match=r"word must be \[2, 16\] in torch.bool, got \[1, 16\]"):
        coactivation(active[:1, 0], active)
    with pytest.raises(ValueError, match="image must be"):
        coactivation(active[:, 0], active[0])
