"""CoreMatching's counts and elbow against the product of activations in plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

import tokred
from cases.prompts import prompt_call
from cases.selection import best_of, check_rows, padding, picked, uniform
from cases.tiny_vlms import FAMILIES
from tokred.methods.core_matching import (
    CoreMatchingOptions,
    activations,
    coactivation,
    select_tokens,
)
from tokred.patching import LayerStates


@pytest.mark.parametrize("neurons", [0, 1, 8, 61, 2048, 5000])
def test_counts(neurons: int) -> None:
    """More neurons than 255 words of 64 bits hold, and all of them."""
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
    descending = sorted((scores[i].item() for i in valid), reverse=True)
    last, drop = len(descending) - 1, descending[0] - descending[-1]
    away = [abs(-drop * r - last * (v - descending[0])) for r, v in enumerate(descending)]
    threshold = descending[int(np.argmax(away))]
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


def test_by_the_fifth_word_from_the_last() -> None:
    """Rows with padding in front; the neurons' signs alone decide what is kept."""
    call = prompt_call(layer=6, num_layers=32)
    method = CoreMatchingOptions(keep=9)
    assert method.prune_layers(32) == [6] and method.watch(32) == [5]
    neurons = torch.randn(*call.hidden.shape[:2], 61, generator=torch.Generator().manual_seed(1))
    states = [call.hidden] * 4
    method.observe(LayerStates(5, 32, *states, call.valid, call.visual, call.carried, neurons))
    found = method.prune(call)
    for row, there in enumerate(call.valid):
        places = there.nonzero()[:, 0].tolist()
        word = neurons[row, places[-5]] > 0
        shared = ((neurons[row] > 0) & word).sum(-1).float()
        slots = [s for s in call.slots[row].tolist() if s >= 0]
        scores = shared[slots]
        expected = transcription(scores, list(range(len(slots))), k=9) if slots else []
        assert picked(found[row]) == expected


@torch.no_grad()
def test_in_a_model() -> None:
    """The neurons are those that the layer before has, and what is left is what they choose."""
    family = next(family for family in FAMILIES if family.name == "llava")
    model, inputs = family.model(), family.prompt((1,))
    layers = model.model.language_model.layers
    seen: list[torch.Tensor] = []
    hook = layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lengths: list[int] = []
    last = layers[-1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    model(**inputs)
    with tokred.patch(model, "core_matching", layer=1):
        model(**inputs)
    hook.remove()
    last.remove()
    active = seen[0][0] > 0
    visual = inputs["input_ids"][0] == model.config.image_token_id
    scores = (active & active[-5]).sum(-1).float()[visual]
    dropped = len(scores) - len(transcription(scores, list(range(len(scores)))))
    assert lengths == [len(visual), len(visual) - dropped] and dropped > 0


def test_refusals() -> None:
    for options, message in (
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"layer": 0}, "layer must be at least 1, got 0"),
        ({"word": 0}, "word must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CoreMatchingOptions(**options)
    active = torch.ones(2, 4, 16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"word must be \[2, 16\] in torch.bool"):
        coactivation(active[:, 0].float(), active)
    with pytest.raises(ValueError, match=r"word must be \[2, 16\] in torch.bool, got \[1, 16\]"):
        coactivation(active[:1, 0], active)
    with pytest.raises(ValueError, match="image must be"):
        coactivation(active[:, 0], active[0])
