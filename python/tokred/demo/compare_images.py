"""The comparison on photographs: DINOv2 ViT-S/14, whose tokens merge or are dropped on the way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import tokred
from tokred.evaluation.budgets import fitted, options_at, reducers
from tokred.evaluation.measure import peak_bytes, timed
from tokred.methods import get

from .compare import Comparison, Entry, with_front
from .dinov2 import PATCH_SIZE, load_dinov2
from .gallery import photograph_from
from .images import Photograph, tokens_left

CLASS, PATCHES = "CLS cosine", "patch cosine"


def compare(
    paths: Sequence[str],
    budgets: Sequence[float],
    names: Sequence[str],
    size: int,
    repeats: int,
) -> Comparison:
    """All methods, or those of these names, at every budget on every photograph.

    Raises:
        ValueError: a size that is no multiple of the patches', or a name that is no such method.
        OSError: a file that cannot be read.
    """
    if size < PATCH_SIZE or size % PATCH_SIZE:
        raise ValueError(f"--size must be a multiple of {PATCH_SIZE}, got {size}")
    photographs = [photograph_from(path, size) for path in paths]
    chosen = reducers(names, "--methods")
    model = load_dinov2()
    layers, tokens = model.config.num_hidden_layers, (size // PATCH_SIZE) ** 2
    runs = [
        Run(model, method.name, budget, options)
        for budget in budgets
        for method in chosen
        if (options := options_at(method, layers, tokens, budget)) is not None
    ]
    for run in runs:
        run.fit(photographs[0].pixels)
    dense = [_turns(model, photograph, runs, repeats) for photograph in photographs]
    megabytes = peak_bytes(lambda: model(photographs[0].pixels)) / 1e6
    entries = [run.entry(statistics.median(dense) * 1e3, megabytes, photographs[0]) for run in runs]
    for entry in entries:
        print(f"{entry.method}: {entry.kept} tokens, {entry.speed_up:.2f}×", flush=True)
    return Comparison(
        name=Path(paths[0]).stem if len(paths) == 1 else f"{len(paths)}_photographs",
        model=f"DINOv2 ViT-S/14 at {size} pixels, float32",
        practice="transformers with SDPA",
        of="tokens",
        quality=(CLASS, PATCHES),
        lower_is_better=False,
        dense={CLASS: 1.0, PATCHES: 1.0},
        entries=with_front(entries, CLASS, lower_is_better=False),
    )


class Run:
    """One method at one budget, and what its turns have measured."""

    def __init__(self, model: nn.Module, name: str, budget: float, options: dict[str, Any]) -> None:
        self.model, self.name, self.budget, self.options = model, name, budget, options
        self.seconds: list[float] = []
        self.cosines: list[Tensor] = []
        self.tokens = 0

    def fit(self, pixels: Tensor) -> None:
        """Corrects the ratio of a method that leaves another share of its tokens than that says."""
        layers = self.model.config.num_hidden_layers
        wanted = self.budget * (pixels.shape[-1] // PATCH_SIZE) ** 2
        left = partial(tokens_left, self.model, self.name, pixels)
        self.options = fitted(get(self.name), layers, self.options, wanted, left)

    def turn(self, pixels: Tensor, expected: Tensor) -> None:
        """Runs the model with the method once, and compares every original token."""
        with tokred.patch(self.model, self.name, trace_source=True, **self.options) as handle:
            reduced, seconds = timed(lambda: self.model(pixels).last_hidden_state)
            self.tokens = reduced.shape[1]
            cosine = functional.cosine_similarity(handle.unmerge(reduced), expected, dim=-1)[0]
        self.seconds.append(seconds)
        self.cosines.append(torch.stack([cosine[0], cosine[1:].mean()]))

    def entry(self, dense_ms: float, dense_megabytes: float, photograph: Photograph) -> Entry:
        """Its medians and means; the memory is that of one more run."""
        with tokred.patch(self.model, self.name, **self.options):
            peak = peak_bytes(lambda: self.model(photograph.pixels))
        cls, patches = torch.stack(self.cosines).mean(0).tolist()
        return Entry(
            method=self.name,
            options=self.options,
            budget=self.budget,
            kept=self.tokens,
            quality={CLASS: cls, PATCHES: patches},
            milliseconds=statistics.median(self.seconds) * 1e3,
            dense_milliseconds=dense_ms,
            megabytes=peak / 1e6,
            dense_megabytes=dense_megabytes,
        )


def _turns(model: nn.Module, photograph: Photograph, runs: Sequence[Run], repeats: int) -> float:
    """Every run in turns with the dense model; the median of that one's seconds."""
    seconds = []
    for repeat in range(repeats + 1):
        expected, dense = timed(lambda: model(photograph.pixels).last_hidden_state)
        seconds.append(dense)
        for run in runs:
            run.turn(photograph.pixels, expected)
            if repeat == 0:  # warms up
                run.seconds.pop()
    return statistics.median(seconds[1:])
