"""SmolLM2-135M decoding one token on caches of a few bits, beside transformers' own.

Every candidate decodes into a cache of its own that starts with the same random keys and values.
transformers' DynamicCache copies itself at every step, its StaticCache does not.
transformers' QuantizedCache (quanto) keeps few bits too, but unpacks all of them at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.demo_text import dense_attention
from tokred.models.offline import MissingModelError
from tokred.models.smollm2 import load_smollm2

from .bench_models import allow_torchvision
from .harness import Case
from .machine import Run


def filled(cache: Any, config: Any, tokens: int) -> Any:
    """The cache with random states of so many tokens in every layer."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, generator=draw), layer)
    return cache


def decode_case(model: torch.nn.Module, context: int) -> Case:
    config = model.config

    def step(attention: Callable[[], AbstractContextManager], cache: Any) -> Tensor:
        token = torch.zeros(1, 1, dtype=torch.long)
        with torch.inference_mode(), attention():
            return model(token, past_key_values=cache).logits

    def build() -> dict[str, Callable]:
        from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

        sdpa = partial(dense_attention, model, "sdpa")
        ours = partial(dense_attention, model)
        caches = {
            "tokred.PackedCache, 4 bits": (ours, tokred.PackedCache(config, bits=4)),
            "tokred.PackedCache, 2 bits": (ours, tokred.PackedCache(config, bits=2)),
            "tokred attention, dense cache": (ours, DynamicCache(config=config)),
            "SDPA, dense cache": (sdpa, DynamicCache(config=config)),
            "SDPA, StaticCache": (sdpa, StaticCache(config=config, max_cache_len=context + 256)),
        }
        for bits in (4, 2):
            name = f"SDPA, QuantizedCache, {bits} bits"
            caches[name] = (sdpa, QuantizedCache("quanto", config, nbits=bits))
        return {
            name: partial(step, attention, filled(cache, config, context))
            for name, (attention, cache) in caches.items()
        }

    return Case("cache", "decode, SmolLM2-135M", (1, context), "float32", build)


def cases(run: Run) -> Iterator[Case]:
    if run.device != "cpu":
        return
    allow_torchvision()
    try:
        model, _ = load_smollm2()
    except MissingModelError as error:
        print(f"\ncache: {error}")
        return
    for context in (1024, 8000) if run.quick else (1024, 2048, 4096, 8000):
        yield decode_case(model, context)
