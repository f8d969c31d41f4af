"""The comparison on text: SmolLM2-135M, which decodes from some of its cached keys.

The text fills the cache, with sentences that give a number to a city (needles) among it. Behind it
come the perplexity of what follows, and the numbers again: how many of their tokens the model still
names when it is asked for them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.compat import cache_keyword
from tokred.evaluation.budgets import keys_at, selectors
from tokred.evaluation.decoding import dense_attention
from tokred.evaluation.measure import peak_bytes
from tokred.evaluation.needles import Prompt

from .compare import Comparison, Entry, with_front
from .smollm2 import CONTEXT, load_smollm2

PERPLEXITY, RECALL = "perplexity", "needle recall"
CHUNK = 1024  # tokens of the prompt that the model reads at a time


def compare(
    path: Path,
    budgets: Sequence[float],
    names: Sequence[str],
    context: int,
    decoded: int,
    repeats: int,
) -> Comparison:
    """All methods, or those of these names, at every budget.

    Raises:
        ValueError: numbers that do not fit, a text that is too short, or a name that is no method.
        OSError: a file that cannot be read.
    """
    if decoded < 1 or not 64 <= context <= CONTEXT - decoded:
        raise ValueError(
            f"--decoded must be at least 1 and --context from 64 to {CONTEXT - decoded}, got "
            f"{decoded} and {context}"
        )
    chosen, text = selectors(names), path.read_text(encoding="utf-8")
    model, tokenizer = load_smollm2()
    prompt = Prompt.of(tokenizer, text, context, decoded)
    reader = Reader(model, prompt)
    with dense_attention(model, "sdpa"):
        dense = reader.quality()
        dense_bytes = peak_bytes(reader.step)
    patches = {
        (method.name, budget): keys_at(method, max(round(context * budget), 1))
        for budget in budgets
        for method in chosen
    }
    seconds = reader.times(patches, repeats)
    entries = []
    for (name, budget), options in patches.items():
        with tokred.patch(model, name, **options):
            quality = reader.quality()
            peak = peak_bytes(reader.step)
        entry = Entry(
            method=name,
            options=options,
            budget=budget,
            kept=max(round(context * budget), 1),
            quality=quality,
            milliseconds=seconds[name, budget] * 1e3,
            dense_milliseconds=seconds["dense", 1.0] * 1e3,
            megabytes=peak / 1e6,
            dense_megabytes=dense_bytes / 1e6,
        )
        entries.append(entry)
        print(f"{name}: {entry.kept} keys, {entry.speed_up:.2f}×", flush=True)
    return Comparison(
        name=path.stem,
        model=f"SmolLM2-135M decoding behind {context} tokens, float32",
        practice="transformers with SDPA on a StaticCache",
        of="keys",
        quality=(PERPLEXITY, RECALL),
        lower_is_better=True,
        dense=dense,
        entries=with_front(entries, PERPLEXITY, lower_is_better=True),
    )


class Reader:
    """A model that has read the context, once and densely, and decodes behind it."""

    def __init__(self, model: nn.Module, prompt: Prompt) -> None:
        from transformers import DynamicCache

        self.model, self.prompt = model, prompt
        self.cache = DynamicCache(config=model.config)
        with dense_attention(model):
            for chunk in prompt.context.split(CHUNK, 1):
                model(chunk, logits_to_keep=1, **{cache_keyword(): self.cache})

    def quality(self) -> dict[str, float]:
        """The perplexity of what follows, and the share of the needles' tokens that are named."""
        after = self.prompt.after
        loss = -self._log_probabilities(after[:, :-1]).gather(1, after[0, 1:, None]).mean()
        named = [needle.named(self._log_probabilities) for needle in self.prompt.needles]
        return {PERPLEXITY: math.exp(loss.item()), RECALL: torch.cat(named).float().mean().item()}

    def step(self) -> None:
        """Decodes one token, and forgets it."""
        self._log_probabilities(self.prompt.after[:, :1])

    def times(
        self, patches: dict[tuple[str, float], dict[str, Any]], repeats: int
    ) -> dict[tuple[str, float], float]:
        """The median seconds of a token, of every method and of "dense" at 1.0, in turns.

        All decode into one StaticCache, which does not copy itself at every step.
        """
        from transformers import StaticCache

        def dense() -> AbstractContextManager:
            return dense_attention(self.model, "sdpa")

        turns = [(("dense", 1.0), dense)] + [
            (key, lambda key=key: tokred.patch(self.model, key[0], **patches[key]))
            for key in patches
        ]
        length = self.prompt.context.shape[1] + (repeats + 1) * len(turns)
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, number)
        seconds: dict[tuple[str, float], list[float]] = {key: [] for key, _ in turns}
        for _ in range(repeats + 1):
            for key, patch in turns:
                with patch():
                    start = time.perf_counter()
                    self.model(self.prompt.after[:, :1], **{cache_keyword(): cache})
                    seconds[key].append(time.perf_counter() - start)
        return {key: statistics.median(times[1:]) for key, times in seconds.items()}

    def _log_probabilities(self, ids: Tensor) -> Tensor:
        """f32 [N, vocabulary] of the tokens behind ids i64 [1, N], decoded one after another."""
        rows = []
        for token in ids.split(1, 1):
            logits = self.model(token, **{cache_keyword(): self.cache}).logits
            rows.append(logits[0, -1].float().log_softmax(-1))
        self.cache.crop(-ids.shape[1])
        return torch.stack(rows)
