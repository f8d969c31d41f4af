"""The comparison on passages of a text: MiniLM, whose tokens merge or are dropped on the way.

Passages of unequal lengths are embedded in padded batches. What counts is how alike they are: the
correlation of the similarities of all pairs with those that the whole model finds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred.evaluation import budgets as fitting
from tokred.evaluation.budgets import named
from tokred.evaluation.measure import peak_bytes, timed
from tokred.methods import Method, get

from .compare import Comparison, Entry, with_front
from .minilm import embeddings, load_minilm

SIMILARITIES, EMBEDDINGS = "similarity correlation", "embedding cosine"
SHORTEST, LONGEST = 64, 254  # tokens of a passage, without those that the tokenizer adds
BATCH = 8  # passages

Batches = list[tuple[Tensor, Tensor]]


def compare(
    path: Path, budgets: Sequence[float], names: Sequence[str], passages: int, repeats: int
) -> Comparison:
    """All methods, or those of these names, at every budget.

    Raises:
        ValueError: fewer than 3 passages, a text that is too short, or a name that is no method.
        OSError: a file that cannot be read.
    """
    if passages < 3:
        raise ValueError(f"--passages must be at least 3, got {passages}")
    chosen, text = reducers(names), path.read_text(encoding="utf-8")
    model, tokenizer = load_minilm()
    batches = batches_of(tokenizer, text, passages)
    tokens = int(sum(mask.sum() for _, mask in batches))
    runs = [Run(model, batches, method, budget) for budget in budgets for method in chosen]
    for run in runs:
        run.fit()
    seconds, expected = [], torch.empty(0)
    for repeat in range(repeats + 1):
        expected, dense = timed(lambda: embedded(model, batches))
        seconds.append(dense)
        for run in runs:
            run.turn(expected)
            if repeat == 0:  # warms up
                run.seconds.pop()
    megabytes = peak_bytes(lambda: embedded(model, batches)) / 1e6
    entries = [run.entry(statistics.median(seconds[1:]) * 1e3, megabytes) for run in runs]
    for entry in entries:
        print(f"{entry.method}: {entry.kept} tokens, {entry.speed_up:.2f}×", flush=True)
    return Comparison(
        name=f"{path.stem}_sentences",
        model=f"MiniLM-L6 on {passages} passages of {tokens} tokens, float32",
        practice="transformers with SDPA, passages of like lengths in a batch",
        of="tokens",
        quality=(SIMILARITIES, EMBEDDINGS),
        lower_is_better=False,
        dense={SIMILARITIES: 1.0, EMBEDDINGS: 1.0},
        entries=with_front(entries, SIMILARITIES, lower_is_better=False),
    )


def reducers(names: Sequence[str] = ()) -> list[Method]:
    """The methods whose budget is an option, and that need no grid of tokens.

    Raises:
        ValueError: a name that is none of them.
    """
    found = {method.name: method for method in fitting.reducers((), "--methods")}
    found = {name: found[name] for name in found if name not in fitting.REDUCE_ONCE}
    return named(found, names, "--methods")


def batches_of(tokenizer: Any, text: str, passages: int) -> Batches:
    """(ids i64 [B, N], mask i64 [B, N]) of passages that follow one another, by their lengths.

    Raises:
        ValueError: the text has too few tokens.
    """
    spread = LONGEST - SHORTEST
    lengths = [SHORTEST + round(spread * (i * 0.618 % 1)) for i in range(passages)]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < sum(lengths):
        raise ValueError(
            f"the text must have at least {sum(lengths)} tokens for {passages} passages, got "
            f"{len(ids)}"
        )
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [
        torch.tensor([tokenizer.cls_token_id, *ids[end - length : end], tokenizer.sep_token_id])
        for end, length in zip(ends, lengths, strict=True)
    ]
    rows.sort(key=len)
    batches = []
    for first in range(0, passages, BATCH):
        part = rows[first : first + BATCH]
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        there = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in part])[:, None]
        batches.append((padded, there.long()))
    return batches


def embedded(model: nn.Module, batches: Batches) -> Tensor:
    """The embeddings of all passages, f32 [passages, 384]."""
    return torch.cat([embeddings(model, ids, mask) for ids, mask in batches])


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """The correlation of the similarities of all pairs of passages."""
    above = torch.ones(len(ours), len(ours), dtype=torch.bool).triu(1)
    pairs = torch.stack([(x @ x.T)[above] for x in (ours, theirs)])
    return float(torch.corrcoef(pairs)[0, 1])


class Run:
    """One method at one budget, and what its turns have measured."""

    def __init__(self, model: nn.Module, batches: Batches, method: Method, budget: float) -> None:
        self.model, self.batches, self.name, self.budget = model, batches, method.name, budget
        layers = model.config.num_hidden_layers
        options = fitting.options_at(method, layers, LONGEST, budget)
        assert options is not None  # reducers() has asked
        # The rows differ in length: every layer takes the same share of each.
        self.options = {"r": 1 - budget ** (1 / layers)} if "r" in options else options
        self.seconds: list[float] = []
        self.quality: dict[str, float] = {}
        self.tokens = 0

    def fit(self) -> None:
        """Corrects the ratio of a method that leaves another share of its tokens than that says."""
        some = self.batches[-1:]
        wanted = self.budget * int(some[0][1].sum())
        layers = self.model.config.num_hidden_layers
        left = partial(self._left, some)
        self.options = fitting.fitted(get(self.name), layers, self.options, wanted, left)
        self.tokens = self._left(self.batches, self.options)

    def turn(self, expected: Tensor) -> None:
        """Runs the model with the method once."""
        with tokred.patch(self.model, self.name, **self.options):
            reduced, seconds = timed(lambda: embedded(self.model, self.batches))
        self.seconds.append(seconds)
        cosine = (reduced * expected).sum(-1).mean()
        self.quality = {SIMILARITIES: correlation(reduced, expected), EMBEDDINGS: float(cosine)}

    def entry(self, dense_ms: float, dense_megabytes: float) -> Entry:
        """Its medians; the memory is that of one more run."""
        with tokred.patch(self.model, self.name, **self.options):
            peak = peak_bytes(lambda: embedded(self.model, self.batches))
        return Entry(
            method=self.name,
            options=self.options,
            budget=self.budget,
            kept=self.tokens,
            quality=self.quality,
            milliseconds=statistics.median(self.seconds) * 1e3,
            dense_milliseconds=dense_ms,
            megabytes=peak / 1e6,
            dense_megabytes=dense_megabytes,
        )

    def _left(self, batches: Batches, options: dict[str, Any]) -> int:
        """The tokens that are left of some batches."""
        count = 0
        with tokred.patch(self.model, self.name, **options) as handle:
            for ids, mask in batches:
                self.model(input_ids=ids, attention_mask=mask)
                count += int((handle.size > 0).sum())
        return count
