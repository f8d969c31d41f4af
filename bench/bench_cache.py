"""SmolLM2-135M decoding one token on caches of a few bits, beside transformers' own.

Every candidate decodes into a cache of its own that starts with the same random keys and values.
The best dense practice is SDPA on transformers' StaticCache; its DynamicCache copies itself at
every step. transformers' QuantizedCache (quanto) keeps few bits too, but unpacks all of them at
every step. Methods that evict keep a quarter of the keys of the same context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.compat import cache_keyword
from tokred.demo.offline import MissingModelError
from tokred.demo.smollm2 import load_smollm2
from tokred.evaluation.decoding import dense_attention

from .bench_models import allow_torchvision, inside
from .harness import MAX_SAMPLES, Case
from .machine import Run

EVICTORS = ("snap_kv", "h2o", "streaming_llm")


def filled(cache: Any, config: Any, tokens: int) -> Any:
    """The cache with random states of so many tokens in every layer."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, generator=draw), layer)
    return cache


def decode_case(model: torch.nn.Module, context: int) -> Case:
    config, held = model.config, ExitStack()

    def step(patched: nn.Module, cache: Any) -> Tensor:
        token = torch.zeros(1, 1, dtype=torch.long)
        with torch.inference_mode():
            return patched(token, **{cache_keyword(): cache}).logits

    def build() -> dict[str, Callable]:
        from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

        sdpa = inside(partial(dense_attention, name="sdpa"), model, held)
        ours = inside(dense_attention, model, held)
        tidal = inside(partial(tokred.patch, method="tidal_decode", k=256), model, held)
        # As long as the samples need: a longer one would be slower.
        static = partial(StaticCache, config=config, max_cache_len=context + MAX_SAMPLES + 8)
        dynamic = partial(DynamicCache, config=config)
        caches = {
            "tokred.PackedCache, 4 bits": (ours, tokred.PackedCache(config, bits=4)),
            "tokred.PackedCache, 2 bits": (ours, tokred.PackedCache(config, bits=2)),
            "tokred attention, StaticCache": (ours, static()),
            "tokred attention, DenseCache": (ours, tokred.DenseCache(config)),
            "tokred attention, DynamicCache": (ours, dynamic()),
            "tokred tidal_decode, k = 256, StaticCache": (tidal, static()),
            "SDPA, StaticCache": (sdpa, static()),
            "SDPA, DenseCache": (sdpa, tokred.DenseCache(config)),
            "SDPA, DynamicCache": (sdpa, dynamic()),
        }
        calls = {
            name: partial(step, patched, filled(cache, config, context))
            for name, (patched, cache) in caches.items()
        }
        for method in EVICTORS:
            # A prompt as long as the budget: a step costs what it costs after a longer one.
            evicting = partial(tokred.patch, method=method, budget=context // 4)
            patched = inside(evicting, model, held)
            with torch.inference_mode():
                prompt = torch.randint(config.vocab_size, (1, context // 4))
                cache = patched(prompt, use_cache=True, logits_to_keep=1)[cache_keyword()]
            calls[f"tokred {method}, a quarter of the keys"] = partial(step, patched, cache)
        for bits in (4, 2) if find_spec("optimum") else ():
            name = f"SDPA, QuantizedCache, {bits} bits"
            try:
                cache = QuantizedCache("quanto", config, nbits=bits)
                calls[name] = partial(step, sdpa, filled(cache, config, context))
                calls[name]()
            except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                calls.pop(name, None)
                print(f"without {name}: {error}")
        return calls

    return Case(
        "cache", "decode, SmolLM2-135M", (1, context), "float32", build, context=lambda: held
    )


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
