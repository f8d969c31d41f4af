"""Vision-language models with fewer visual tokens, against their language model on those tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import attributes
from cases.tiny_vlms import FAMILIES, IMAGES, Family
from cases.vlm_oracle import Row, greedy, kept_places, logits_of, rows_of
from tokred.methods._visual import VisualOptions
from tokred.patching import Patch, PromptCall, Settings, VisualCall, VisualTokens

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}
WINDOWED = ("gemma3",)
PRUNED = [family for family in FAMILIES if family.name not in WINDOWED]


def evenly(tokens: int, keep: int) -> Tensor:
    keep = min(tokens, keep)
    return torch.arange(keep) * tokens // max(keep, 1)


@dataclass(frozen=True)
class Evenly(VisualOptions):
    """Keeps evenly spaced tokens; backwards where reverse is set. Reads the encoder if read is."""

    reverse: bool = False
    read: int | None = None

    def encoder_layers(self, num_layers: int) -> list[int]:
        return [] if self.read is None else [self.read]

    def reduce_visual(self, call: VisualCall) -> Any:
        if self.read is not None:
            call.received_attention(self.read), call.keys(self.read)
        chosen = evenly(call.tokens.shape[1], self.keep)
        return (chosen.flip(0) if self.reverse else chosen).int()[None]


@dataclass(frozen=True)
class Layers(VisualOptions):
    """Before layer 1 keeps `keep` evenly spaced tokens of each row, before layer 3 half of them."""

    def prune_layers(self, num_layers: int) -> list[int]:
        return [1, 3]

    def prune(self, call: PromptCall) -> Tensor:
        keep = self.keep if call.layer == 1 else self.keep // 2
        rows = []
        for row in call.is_slot:
            chosen = evenly(int(row.sum()), keep)
            rows.append(torch.cat([chosen, torch.full((keep - len(chosen),), -1)]))
        return torch.stack(rows).int()


def patched(model: nn.Module, method: Any) -> Patch:
    return Patch(model, method, Settings())


def valid_logits(output: Any, state: Any, row: int, count: int) -> Tensor:
    return output.logits[row, -count:]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def generated(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Tensor:
    options = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": list(IMAGES), **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("kind", [Evenly, Layers])
@torch.no_grad()
def test_keeping_all_changes_nothing(family: Family, kind: type) -> None:
    if kind is Layers and family.name in WINDOWED:
        pytest.skip("refused, see test_refused_models")
    model, inputs = family.model(), family.prompt((1, 2, 0))
    before = attributes(model)
    expected, tokens = model(**inputs).logits, generated(model, inputs)
    every = 10**6 if kind is Layers else 36 * 9
    method = kind(keep=every, **({"read": -1} if kind is Evenly else {}))
    with patched(model, method) as handle:
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(generated(model, inputs), tokens)
        counts = handle.states[0].counts
        assert len(counts) == 3 and all(n == kept for n, kept in counts)
    assert attributes(model) == before
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("positions", ["auto", "kept", "renumbered"])
@torch.no_grad()
def test_keeping_some_is_the_language_model_on_these(family: Family, positions: str) -> None:
    """In batches with different numbers of images, padded on the left, with and without a cache."""
    model, inputs = family.model(), family.prompt((1, 2, 0))
    rows = rows_of(model, family.name, inputs)
    planes = rows[0].positions.dim() == 2
    renumber = positions == "renumbered" or (positions == "auto" and not planes)
    keep = 4
    method = Evenly(keep=keep, positions=positions, newlines="drop")
    with patched(model, method) as handle:
        output = model(**inputs)
        tokens = generated(model, inputs)
        counts = handle.states[0].counts
        uncached = generated(model, inputs, use_cache=False)
    assert torch.equal(tokens, uncached)
    assert all(kept == keep for _, kept in counts)
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, keep), renumber)
        expected = logits_of(model, short)
        actual = output.logits[number, -len(short.x) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, short, 5)
    assert output.logits.shape[1] == max(len(_kept(family, row, keep)) for row in rows)


def _kept(family: Family, row: Row, keep: int, reverse: bool = False) -> Tensor:
    """The places of a row that Evenly keeps: in models of any resolution, of what is no newline."""

    def choose(tokens: int) -> Tensor:
        picture = torch.arange(tokens)
        if family.kind == "anyres":
            picture = picture[~newlines(tokens)]
        chosen = picture[evenly(len(picture), keep)]
        return chosen.flip(0) if reverse else chosen

    return kept_places(row, choose)


def newlines(tokens: int) -> Tensor:
    """bool [tokens]: the ends of the rows of patches behind a thumbnail of 36 tokens."""
    columns = {36 + 12 * 13: 12, 36 + 6 * 13: 12, 36 + 12 * 7: 6, 36 + 12 * 12: 11}[tokens]
    place = torch.arange(tokens) - 36
    return (place >= 0) & (place % (columns + 1) == columns)


@pytest.mark.parametrize("positions", ["auto", "renumbered", "kept"])
@pytest.mark.parametrize("family", PRUNED, ids=lambda family: family.name)
@torch.no_grad()
def test_pruning_between_layers(family: Family, positions: str) -> None:
    model, inputs = family.model(), family.prompt((1, 2, 0))
    rows = rows_of(model, family.name, inputs)
    planes = rows[0].positions.dim() == 2
    renumber = positions == "renumbered" or (positions == "auto" and not planes)
    keep = 4
    with patched(model, Layers(keep=keep, positions=positions, newlines="drop")):
        output = model(**inputs)
        tokens = generated(model, inputs)
        uncached = generated(model, inputs, use_cache=False)
    assert torch.equal(tokens, uncached)
    for number, row in enumerate(rows):
        drops = _dropped(family, row, keep)
        expected = logits_of(model, row, drops, renumber)
        actual = output.logits[number, -len(expected) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        assert tokens[number].tolist() == greedy(model, row, 5, drops, renumber)


def _dropped(family: Family, row: Row, keep: int) -> dict[int, Tensor]:
    """By layer, the places of a row that Layers drops."""
    visual = (row.image >= 0).nonzero()[:, 0]
    if not len(visual):
        return {}
    picture = visual
    if family.kind == "anyres":
        parts = [visual[row.image[visual] == i] for i in range(int(row.image.max()) + 1)]
        picture = torch.cat([part[~newlines(len(part))] for part in parts])
    first = picture[evenly(len(picture), keep)]
    second = first[evenly(len(first), keep // 2)]
    return {1: visual[~torch.isin(visual, first)], 3: visual[~torch.isin(visual, second)]}


@torch.no_grad()
def test_rows_padded_on_the_right(family: Family) -> None:
    model, inputs = family.model(), family.prompt((2, 1), padding="right")
    rows = rows_of(model, family.name, inputs)
    with patched(model, Evenly(keep=3, newlines="drop", positions="renumbered")):
        logits = model(**inputs).logits
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, 3), True)
        expected = logits_of(model, short)
        actual = logits[number, : len(short.x)]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_tokens_stay_in_the_order_returned(family: Family) -> None:
    model, inputs = family.model(), family.prompt((1, 2))
    rows = rows_of(model, family.name, inputs)
    with patched(model, Evenly(keep=4, reverse=True, newlines="drop", positions="kept")):
        output = model(**inputs)
    for number, row in enumerate(rows):
        short = row.take(_kept(family, row, 4, reverse=True), False)
        expected = logits_of(model, short)
        actual = output.logits[number, -len(short.x) :]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
