"""EVAD against the columns of whole attention matrices, and in a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tokred
from cases.dropping import Layer, check_dropping, lively_timm
from cases.groups import check_in_a_model
from tokred.methods.evad import EvadOptions, evad_keep


@pytest.mark.parametrize(("tokens", "kept"), [(10, 0), (10, 4), (23, 6), (10, 10)])
def test_tokens_that_stay(tokens: int, kept: int) -> None:
    received = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    received[1, kept:] = received[1, kept:].round(decimals=1)  # ties
    for ratio in (0.3, 0.7, 1.0):
        rows = evad_keep(received, ratio, kept)
        count = max(math.ceil(ratio * tokens), kept)
        for item in range(2):
            others = sorted(range(kept, tokens), key=lambda i: (-received[item, i].item(), i))
            assert rows[item].tolist() == [*range(kept), *others[: count - kept]]


def test_nan_is_last() -> None:
    received = torch.tensor([[0.1, torch.nan, 0.3, 0.2]])
    assert evad_keep(received, 0.75, 0).tolist() == [[2, 3, 0]]
    assert evad_keep(received, 1.0, 0).tolist() == [[2, 3, 0, 1]]


def chosen(weight: float, key_tokens: int):
    """The keyframe is behind the class token; layers 0 and 1 keep ceil(0.6 N)."""

    def choose(layer: Layer) -> Tensor | None:
        if layer.number == 2:
            return None
        kept, tokens = 1 + key_tokens, layer.x.shape[1]
        weights = torch.ones(tokens)
        weights[1:kept] = weight
        columns = (layer.attention * weights[:, None]).mean((1, 2))
        best = columns[:, kept:].topk(max(math.ceil(0.6 * tokens) - kept, 0)).indices + kept
        return torch.cat([torch.arange(kept).repeat(len(best), 1), best], 1)

    return choose


@pytest.mark.parametrize(("weight", "key_tokens"), [(1.0, 0), (4.0, 6), (1.0, 6)])
def test_in_a_model(weight: float, key_tokens: int) -> None:
    options = dict(ratio=0.6, at=[0, 1], key_tokens=key_tokens, key_weight=weight)
    check_dropping("evad", options, chosen(weight, key_tokens))


def test_counts_in_a_model() -> None:
    check_in_a_model("evad", dict(ratio=1.0), dict(ratio=0.7), (37, 26, 19, 14))
    check_in_a_model(
        "evad", dict(ratio=1.0), dict(ratio=0.5, at=[1]), (36, 18), class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_a_keyframe_larger_than_the_image() -> None:
    model = lively_timm()
    with tokred.patch(model, "evad", key_tokens=40), pytest.raises(ValueError, match="41 of 37"):
        model(torch.randn(1, 3, 48, 48))
    with pytest.raises(ValueError, match="key_tokens must be at least 0, got -1"):
        EvadOptions(key_tokens=-1)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        EvadOptions(ratio=0.0)
