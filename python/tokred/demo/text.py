"""The second part of the demo: SmolLM2-135M attending to a few of its cached tokens.

Perplexity of real text as fewer keys are attended to, tokens decoded per second at growing
contexts, and text generated from prompts of different lengths in one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokred
from tokred.compat import cache_keyword
from tokred.evaluation.budgets import FORCED
from tokred.evaluation.decoding import dense_attention
from tokred.evaluation.figure import new_figure
from tokred.evaluation.inputs import reference_text

from .offline import MissingModelError
from .report import (
    SpeedRow,
    mark_dense,
    perplexity_table,
    plot_lines,
    plot_speed,
    publish,
    save_figure,
    speed_rows,
    speed_table,
    speed_verdict,
)
from .smollm2 import load_smollm2

PROMPTS = (
    "The capital of France is",
    "Water boils at one hundred degrees, and it freezes at",
)
GOOD_PERPLEXITY = 1.02


@dataclass(frozen=True)
class TextPlan:
    """What one run measures."""

    tokens: int  # of text, for the perplexity
    keys: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_keys: int
    decoded: int  # tokens timed at each context
    generated: int


FULL = TextPlan(1024, (512, 256, 128, 64, 32), (1024, 2048, 4096, 8000), 256, 12, 16)
QUICK = TextPlan(256, (128, 64), (256,), 64, 3, 4)


@dataclass(frozen=True)
class PerplexityRow:
    method: str
    keys: int
    perplexity: float
    to_dense: float  # its ratio to dense attention's


@dataclass(frozen=True)
class TextReport:
    plan: TextPlan
    dense_perplexity: float
    perplexity: list[PerplexityRow]
    speed: list[SpeedRow]
    exact: bool  # with k >= N the logits are those of the dense kernel, bit for bit
    generated: list[str]


Patch = Callable[[], AbstractContextManager]


def run(plan: TextPlan, output: Path) -> TextReport:
    """Measures, prints two tables, writes text.json and text.png.

    Raises:
        MissingModelError: the model is not installed.
    """
    from rich.console import Console

    console = Console()
    console.print("SmolLM2-135M: loading and reading")
    model, tokenizer = load_smollm2()
    ids = text_ids(tokenizer, max(plan.tokens, *plan.contexts) + plan.decoded + 1)
    with torch.inference_mode():
        dense, rows = _perplexities(model, ids[:, : plan.tokens], plan)
        exact = _is_exact(model, ids[:, : plan.tokens])
        speed = _speeds(model, ids, plan)
        with tokred.patch(model, "token_select", k=8, n_init=2, n_local=4):
            generated = generate_text(model, tokenizer, plan.generated)
    report = TextReport(plan, dense, rows, speed, exact, generated)
    tables = (_perplexity_table(report), speed_table("method", report.speed))
    complete = plan is FULL
    publish(console, report, output / "text", complete, save_plot, tables, _verdict(report))
    return report


def text_ids(tokenizer: Any, count: int) -> Tensor:
    """int64 [1, count]: the first tokens of Python's language reference."""
    ids = tokenizer(reference_text(), return_tensors="pt").input_ids
    if ids.shape[1] < count:
        raise MissingModelError(f"Python's reference has {ids.shape[1]} tokens, {count} are needed")
    return ids[:, :count]


def _perplexities(
    model: torch.nn.Module, ids: Tensor, plan: TextPlan
) -> tuple[float, list[PerplexityRow]]:
    def perplexity(patch: AbstractContextManager) -> float:
        with patch:
            return math.exp(model(ids, labels=ids).loss.item())

    dense = perplexity(nullcontext())
    rows = []
    for keys in plan.keys:
        select = max(keys - sum(FORCED.values()), 1)
        for name, options in (
            ("top_k_attention", {"k": keys}),
            ("token_select", {"k": select, "prefill": "select", "chunk": 16, **FORCED}),
        ):
            value = perplexity(tokred.patch(model, name, **options))
            rows.append(PerplexityRow(name, keys, value, value / dense))
    return dense, rows


def _is_exact(model: torch.nn.Module, ids: Tensor) -> bool:
    with dense_attention(model):
        expected = model(ids).logits
    with tokred.patch(model, "top_k_attention", k=ids.shape[1]):
        return torch.equal(model(ids).logits, expected)


def _speeds(model: torch.nn.Module, ids: Tensor, plan: TextPlan) -> list[SpeedRow]:
    """Decoding after real text, in turns.

    The best dense practice of transformers is SDPA on a StaticCache, which does not copy itself at
    every step, as a DynamicCache does. All but that one decode into one StaticCache of the length
    they need.
    """
    from transformers import DynamicCache, StaticCache

    sdpa = partial(dense_attention, model, "sdpa")
    patches: dict[str, Patch] = {
        "SDPA, StaticCache": sdpa,
        "SDPA, DynamicCache": sdpa,
        "tokred, dense": lambda: dense_attention(model),
        f"token_select, k = {plan.decode_keys}": lambda: tokred.patch(
            model, "token_select", k=plan.decode_keys - sum(FORCED.values()), **FORCED
        ),
        f"tidal_decode, k = {plan.decode_keys}": lambda: tokred.patch(
            model, "tidal_decode", k=plan.decode_keys
        ),
    }
    peers = [name for name in patches if name.startswith("SDPA")]
    prompt = DynamicCache(config=model.config)
    longest = max(plan.contexts)
    with dense_attention(model):
        for start in range(0, longest, 1024):
            chunk = ids[:, start : min(start + 1024, longest)]
            model(chunk, logits_to_keep=1, **{cache_keyword(): prompt})
    rows = []
    for context in plan.contexts:
        steps = (plan.decoded + 1) * (len(patches) - 1)
        static = StaticCache(config=model.config, max_cache_len=context + steps)
        dynamic = DynamicCache(config=model.config)
        for cache in (static, dynamic):
            for number, layer in enumerate(prompt.layers):
                cache.update(layer.keys[:, :, :context], layer.values[:, :, :context], number)
        seconds: dict[str, list[float]] = {name: [] for name in patches}
        for step in range(plan.decoded + 1):
            for name, patch in patches.items():
                cache = dynamic if "DynamicCache" in name else static
                token = ids[:, context + step, None]
                with patch():
                    begin = time.perf_counter()
                    model(token, **{cache_keyword(): cache})
                    seconds[name].append(time.perf_counter() - begin)
        rows += speed_rows(context, seconds, peers)
    return rows


def generate_text(model: torch.nn.Module, tokenizer: Any, tokens: int, **options: Any) -> list[str]:
    """Both prompts continued in one batch, the shorter padded on the left."""
    inputs = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def save_plot(report: TextReport, path: Path) -> None:
    """Perplexity over keys, and tokens per second over the context."""
    figure, (quality, speed) = new_figure(9, 2)
    plot_lines(quality, report.perplexity, "method", "keys", "perplexity")
    mark_dense(quality, report.dense_perplexity, "all keys")
    quality.set_xscale("log", base=2)
    quality.set_xlabel(f"keys attended to, of {report.plan.tokens}")
    quality.set_ylabel("perplexity")
    plot_speed(speed, report.speed)
    save_figure(figure, "SmolLM2-135M, float32", path)


def _perplexity_table(report: TextReport) -> Any:
    tokens = report.plan.tokens
    return perplexity_table(
        f"Perplexity of {tokens} tokens of text",
        ("method", "keys"),
        [
            ("dense (SDPA)", tokens, report.dense_perplexity, None),
            *((row.method, row.keys, row.perplexity, row.to_dense) for row in report.perplexity),
        ],
    )


def _verdict(report: TextReport) -> str:
    good = [row for row in report.perplexity if row.to_dense <= GOOD_PERPLEXITY]
    few = min(good, key=lambda row: row.keys, default=None)
    lines = [
        f"{few.method} with {few.keys} keys stays within 2 % of the dense perplexity"
        if few
        else "no number of keys stays within 2 % of the dense perplexity",
        speed_verdict(report.speed),
        "with k ≥ N the logits are " + ("those of dense attention, bit for bit" if report.exact
                                        else "NOT those of dense attention"),
        *(f"generated: {text!r}" for text in report.generated),
    ]  # fmt: skip
    return "\n".join(lines)
