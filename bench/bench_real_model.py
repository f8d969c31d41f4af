"""SmolLM2-135M decoding one token after real text: milliseconds a step, and what they go to.

The model reads 8192 tokens of Python's reference; longer contexts repeat what it has stored of
them, and rows of a batch are alike. The best dense practice is SDPA on transformers' StaticCache.
Candidates that read whole keys share one StaticCache, which grows by a token at every step, and
those that choose by 4-bit keys one DenseCache. Weights, attention and the rest of a step are
torch.profiler's, of one more step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.compat import cache_keyword
from tokred.demo.offline import MissingModelError
from tokred.demo.smollm2 import load_smollm2
from tokred.demo.text import text_ids
from tokred.evaluation.decoding import dense_attention
from tokred.evaluation.profiler import profiled
from tokred.evaluation.speed import Step

from .bench_models import allow_torchvision, inside
from .harness import MAX_SAMPLES, Case
from .machine import DTYPES, Run

READ = 8192  # tokens, SmolLM2's context
QUICK = ((READ, 1), (4 * READ, 1), (READ, 8))
FULL = (*QUICK, (16 * READ, 1))
_CHUNK = 1024


@cache
def model_and_ids() -> tuple[nn.Module, Tensor]:
    """The model in float32, and i64 [1, READ]."""
    model, tokenizer = load_smollm2()
    return model, text_ids(tokenizer, READ)


@cache
def model_in(dtype: str) -> nn.Module:
    model = model_and_ids()[0]
    return model if dtype == "float32" else copy.deepcopy(model).to(DTYPES[dtype])


@cache
def read_text() -> list[tuple[Tensor, Tensor]]:
    """Keys and values f32 [1, Hkv, READ, D] of every layer."""
    from transformers import DynamicCache

    model, ids = model_and_ids()
    read = DynamicCache(config=model.config)
    with torch.inference_mode(), dense_attention(model):
        for chunk in ids.split(_CHUNK, 1):
            model(chunk, logits_to_keep=1, **{cache_keyword(): read})
    return [(layer.keys, layer.values) for layer in read.layers]


def filled(empty: Any, context: int, batch: int, dtype: str) -> Any:
    """The cache with what was stored of the text, repeated up to the context, in every row."""
    with torch.inference_mode():
        for number, states in enumerate(read_text()):
            rows = (
                x.to(DTYPES[dtype]).repeat(1, 1, context // READ, 1).expand(batch, -1, -1, -1)
                for x in states
            )
            empty.update(*rows, number)
    return empty


def decode_case(context: int, batch: int, dtype: str, quick: bool) -> Case:
    chosen = 2048 if context > READ else 512
    metrics: dict[str, dict[str, float]] = {}
    held = ExitStack()

    def build() -> dict[str, Callable]:
        from transformers import StaticCache

        model = model_in(dtype)
        config, token = model.config, model_and_ids()[1][:, :1].repeat(batch, 1)
        room = 200 if quick else 5 * MAX_SAMPLES  # steps of all candidates that share it
        full = partial(filled, context=context, batch=batch, dtype=dtype)
        static = full(StaticCache(config=config, max_cache_len=context + room))
        scored = full(tokred.DenseCache(config, score_bits=4))
        four, two = (full(tokred.PackedCache(config, bits=bits)) for bits in (4, 2))
        sdpa = inside(partial(dense_attention, name="sdpa"), model, held)
        dense = inside(dense_attention, model, held)
        select, top_k, tidal = (
            inside(partial(tokred.patch, method=method, k=chosen), model, held)
            for method in ("token_select", "top_k_attention", "tidal_decode")
        )
        candidates = {
            "SDPA, StaticCache": (sdpa, static),
            "tokred, StaticCache": (dense, static),
            "tokred, 4 bits": (dense, four),
            "tokred, 2 bits": (dense, two),
            f"tokred token_select, {chosen} keys": (select, static),
            f"tokred token_select, {chosen} keys, by 4 bits": (select, scored),
            f"tokred top_k_attention, {chosen} keys, by 4 bits": (top_k, scored),
            f"tokred token_select, {chosen} keys, 4 bits": (select, four),
            f"tokred tidal_decode, {chosen} keys": (tidal, static),
        }

        def step(patched: nn.Module, stored: Any) -> Tensor:
            with torch.inference_mode():
                return patched(token, **{cache_keyword(): stored}).logits

        calls = {}
        for name, (patched, stored) in candidates.items():
            calls[name] = partial(step, patched, stored)
            calls[name]()
            parts = profiled(Step(nullcontext, calls[name]))
            names = ("weights_ms", "attention_ms", "choosing_ms")
            metrics[name] = {part: 1e3 * x for part, x in zip(names, parts, strict=True)}
        return calls

    return Case(
        "real_model", "decode, SmolLM2-135M", (batch, context), dtype, build, "real text",
        examine=lambda outputs: metrics, context=lambda: held,
    )  # fmt: skip


def cases(run: Run) -> Iterator[Case]:
    if run.device != "cpu":
        return
    allow_torchvision()
    try:
        model_and_ids()
    except MissingModelError as error:
        print(f"\nreal_model: {error}")
        return
    for dtype in ("float32",) if run.quick else ("float32", "bfloat16"):
        for context, batch in QUICK if run.quick else FULL:
            yield decode_case(context, batch, dtype, run.quick)
