"""The third part of the demo: SmolLM2-135M with its keys and values in a few bits.

Perplexity of real text as it is decoded from caches of 8 to 2 bits, with and without the rotation
and the window in full precision, what a token takes, tokens decoded per second at growing contexts,
and text generated from a packed cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.compat import cache_keyword
from tokred.evaluation.decoding import dense_attention
from tokred.evaluation.figure import new_figure

from .report import (
    SpeedRow,
    mark_dense,
    new_table,
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
from .text import generate_text, text_ids

# What of the default options is left out. Groups along tokens need a window, so what has none packs
# keys along channels.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no rotation": {"rotate": False},
    "no window": {"key_axis": "channel", "window": 0},
    "neither": {"key_axis": "channel", "window": 0, "rotate": False},
}
GOOD_PERPLEXITY = {4: 1.03, 2: 1.35}


@dataclass(frozen=True)
class CachePlan:
    """What one run measures."""

    texts: int  # decoded side by side
    prefix: int  # tokens of each in the cache at first
    scored: int  # tokens of each decoded behind that, one by one
    bits: tuple[int, ...]
    contexts: tuple[int, ...]
    speed_bits: tuple[int, ...]
    keys: int  # that the sparse step attends to
    decoded: int  # tokens timed at each context
    generated: int


FULL = CachePlan(12, 384, 20, (8, 4, 3, 2), (1024, 2048, 4096, 8000), (8, 4, 2), 256, 10, 16)
QUICK = CachePlan(2, 192, 8, (4, 2), (256,), (4,), 64, 2, 8)


@dataclass(frozen=True)
class PerplexityRow:
    bits: int
    variant: str
    perplexity: float
    to_dense: float  # its ratio to the dense cache's


@dataclass(frozen=True)
class MemoryRow:
    bits: int
    context: int
    bytes_per_token: float  # all layers, everything counted
    to_float16: float  # its ratio to a dense cache in float16


@dataclass(frozen=True)
class CacheReport:
    plan: CachePlan
    dense_perplexity: float
    float16_bytes_per_token: int
    perplexity: list[PerplexityRow]
    memory: list[MemoryRow]
    speed: list[SpeedRow]
    generated: list[str]


def run(plan: CachePlan, output: Path) -> CacheReport:
    """Measures, prints three tables, writes text_cache.json and text_cache.png.

    Raises:
        MissingModelError: the model is not installed.
    """
    from rich.console import Console

    console = Console()
    console.print("SmolLM2-135M: decoding from packed caches")
    model, tokenizer = load_smollm2()
    length = plan.prefix + plan.scored + 1
    ids = text_ids(tokenizer, plan.texts * length).reshape(plan.texts, length)
    with torch.inference_mode(), dense_attention(model):
        dense, perplexity = _perplexities(model, ids, plan)
        speed, memory = _speeds(model, plan)
        cache = tokred.PackedCache(model.config, 4, window=0)
        generated = generate_text(model, tokenizer, plan.generated, **{cache_keyword(): cache})
    full = _float16_bytes(model.config)
    report = CacheReport(plan, dense, full, perplexity, memory, speed, generated)
    speeds = speed_table("cache", report.speed)
    tables = (_perplexity_table(report), _memory_table(report), speeds)
    complete = plan is FULL
    publish(console, report, output / "text_cache", complete, save_plot, tables, _verdict(report))
    return report


def _perplexities(
    model: torch.nn.Module, ids: Tensor, plan: CachePlan
) -> tuple[float, list[PerplexityRow]]:
    """The prefix once in full precision, and the rest from every cache that it is packed into."""
    from transformers import DynamicCache

    prompt = DynamicCache(config=model.config)
    model(ids[:, : plan.prefix], logits_to_keep=1, **{cache_keyword(): prompt})

    def perplexity(cache: Any) -> float:
        for number, layer in enumerate(prompt.layers):
            cache.update(layer.keys, layer.values, number)
        losses = []
        for place in range(plan.prefix, plan.prefix + plan.scored):
            logits = model(ids[:, place, None], **{cache_keyword(): cache}).logits[:, -1]
            losses.append(functional.cross_entropy(logits, ids[:, place + 1]))
        return torch.stack(losses).mean().exp().item()

    dense = perplexity(DynamicCache(config=model.config))
    rows = []
    for bits in plan.bits:
        for variant, options in VARIANTS.items():
            value = perplexity(tokred.PackedCache(model.config, bits, **options))
            rows.append(PerplexityRow(bits, variant, value, value / dense))
    return dense, rows


@dataclass
class Contender:
    """A cache and how attention reads it."""

    cache: Any
    patch: Callable[[], AbstractContextManager]
    is_peer: bool = False
    seconds: list[float] = field(default_factory=list)


# Where a StaticCache goes, which is made anew for every context: a longer one is slower.
STATIC = None


def _contenders(model: torch.nn.Module, plan: CachePlan) -> dict[str, Contender]:
    """Dense caches and packed ones; a StaticCache with SDPA is the best dense practice."""
    from transformers import DynamicCache

    sdpa = partial(dense_attention, model, "sdpa")

    def sparse() -> AbstractContextManager:
        return tokred.patch(model, "top_k_attention", k=plan.keys)

    def packed(bits: int) -> Any:
        return tokred.PackedCache(model.config, bits)

    return {
        "SDPA, StaticCache": Contender(STATIC, sdpa, is_peer=True),
        "SDPA, DynamicCache": Contender(DynamicCache(config=model.config), sdpa, is_peer=True),
        "tokred, StaticCache": Contender(STATIC, nullcontext),
        **{f"{bits} bits": Contender(packed(bits), nullcontext) for bits in plan.speed_bits},
        f"4 bits, top {plan.keys} keys": Contender(packed(4), sparse),
    }


def _speeds(model: torch.nn.Module, plan: CachePlan) -> tuple[list[SpeedRow], list[MemoryRow]]:
    """Decoding in turns at growing contexts, of random keys and values, which take as long as any.

    Every cache decodes into itself: what it appends and copies is part of its time.
    """
    from transformers import StaticCache

    contenders = _contenders(model, plan)
    growing = [contender for contender in contenders.values() if contender.cache is not STATIC]
    static = [contender for contender in contenders.values() if contender.cache is STATIC]
    peers = [name for name, contender in contenders.items() if contender.is_peer]
    draw = torch.Generator().manual_seed(0)
    token = torch.zeros(1, 1, dtype=torch.long)
    speed, memory = [], []
    for context in plan.contexts:
        missing = context - growing[0].cache.get_seq_length()
        length = context + plan.decoded + 1
        for contender in static:
            contender.cache = StaticCache(config=model.config, max_cache_len=length)
        for number in range(model.config.num_hidden_layers):
            key, value = _random_states(model.config, missing, draw)
            for contender in growing:
                contender.cache.update(key, value, number)
            whole = growing[0].cache.layers[number]
            for contender in static:
                contender.cache.update(whole.keys, whole.values, number)
        for bits in plan.speed_bits:
            cache = contenders[f"{bits} bits"].cache
            share = cache.bytes_per_token() / _float16_bytes(model.config)
            memory.append(MemoryRow(bits, context, cache.bytes_per_token(), share))
        for contender in contenders.values():
            contender.seconds.clear()
        for _ in range(plan.decoded + 1):
            for contender in contenders.values():
                with contender.patch():
                    begin = time.perf_counter()
                    model(token, **{cache_keyword(): contender.cache})
                    contender.seconds.append(time.perf_counter() - begin)
        seconds = {name: contender.seconds for name, contender in contenders.items()}
        speed += speed_rows(context, seconds, peers)
    return speed, memory


def _random_states(config: Any, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    return torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)


def _float16_bytes(config: Any) -> int:
    """Bytes of a token in all layers of a dense cache in float16."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def save_plot(report: CacheReport, path: Path) -> None:
    """Perplexity and bytes of a token over the bits, and tokens per second over the context."""
    figure, (quality, size, speed) = new_figure(12, 3)
    plot_lines(quality, report.perplexity, "variant", "bits", "perplexity")
    mark_dense(quality, report.dense_perplexity, "dense")
    quality.set_yscale("log")
    for axis in (quality.yaxis.set_major_formatter, quality.yaxis.set_minor_formatter):
        axis("{x:.0f}")
    quality.set_ylabel("perplexity")
    plot_lines(size, report.memory, "context", "bits", "bytes_per_token", "{} tokens", unit=1e3)
    mark_dense(size, report.float16_bytes_per_token / 1e3, "dense, float16")
    size.set_ylim(bottom=0)
    size.set_ylabel("kB per token, everything counted")
    for axes in (quality, size):
        axes.set_xlabel("bits")
    plot_speed(speed, report.speed)
    save_figure(figure, "SmolLM2-135M, computed in float32", path)


def _perplexity_table(report: CacheReport) -> Any:
    return perplexity_table(
        f"Perplexity of {report.plan.texts * report.plan.scored} tokens",
        ("cache", "bits"),
        [
            ("dense", 32, report.dense_perplexity, None),
            *((row.variant, row.bits, row.perplexity, row.to_dense) for row in report.perplexity),
        ],
    )


def _memory_table(report: CacheReport) -> Any:
    headings = ("bits", "context", "bytes", "to float16")
    table = new_table("Bytes per token, everything counted", headings)
    table.add_row("dense, 16", "", str(report.float16_bytes_per_token), "1")
    for row in report.memory:
        size, share = f"{row.bytes_per_token:.0f}", f"{row.to_float16:.3f}"
        table.add_row(str(row.bits), str(row.context), size, share)
    return table


def _verdict(report: CacheReport) -> str:
    lines = []
    for row in report.perplexity:
        if row.variant == "default" and row.bits in GOOD_PERPLEXITY:
            good = GOOD_PERPLEXITY[row.bits]
            within = "within" if row.to_dense <= good else "NOT within"
            lines.append(
                f"{row.bits} bits: {row.to_dense:.3f} times the dense perplexity, {within} {good}"
            )
    lines.append(speed_verdict(report.speed))
    lines += [f"generated from 4 bits: {text!r}" for text in report.generated]
    return "\n".join(lines)
