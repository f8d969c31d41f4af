"""What methods keep of the quality of a model of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn

from .candidates import Candidate, Methods, check_bits, check_budgets, check_methods, refused
from .decoding import DecoderTask
from .encoding import EncoderTask
from .inputs import Batch, batches, count
from .progress import Progress
from .results import Result, Row
from .tally import Tally

BUDGETS = (0.5, 0.25)
Task: TypeAlias = DecoderTask | EncoderTask


def evaluate(
    model: nn.Module,
    inputs: Any,
    methods: Methods = None,
    budgets: Sequence[float] = BUDGETS,
    *,
    bits: Sequence[int] = (),
    tokenizer: Any = None,
    decoded: int = 64,
    progress: bool = True,
) -> Result:
    """What methods keep of a model's quality, each beside the unpatched model.

    Of a decoder of transformers: the perplexity of the last tokens of every sequence, decoded one
    by one after the others, the KL divergence of their logits in nats, and with a tokenizer the
    share of numbers hidden in the prompt (needles) that it finds again. Of an encoder of
    transformers or timm: the cosine of the class token and of all others, restored, to the
    unpatched model's.

    Args:
        model: the model, which is left as it was.
        inputs: token numbers i64 [B, N] or pixels [B, C, H, W]; a list of these, or a loader of
            batches, tensors or dicts with input_ids (and attention_mask) or pixel_values. Padding
            is left out.
        methods: names, each at every budget; or a dict of options by name, to which the options of
            each budget are added, unless they say themselves how many tokens stay. None: all that
            serve such a model.
        budgets: shares of the tokens or keys that stay, of the first input.
        bits: of a decoder, packed caches of so many bits as well.
        tokenizer: of a decoder, for the needles.
        decoded: tokens of every sequence that are predicted, at most half of it.
        progress: shows a bar on stderr or in a notebook; a line a step where tqdm is missing.

    Returns:
        A Result: a row for every method and budget, with figures and the line to copy, or with the
        reason why a method or an option does not fit. Ctrl-C returns what was measured so far.

    Raises:
        ValueError: an unknown method, with the nearest names; budgets outside (0, 1]; inputs that
            the model does not take.
        TypeError: inputs, methods or a model of a wrong kind.
    """
    budgets = check(model, methods, budgets, bits)
    if type(decoded) is not int or decoded < 1:
        raise ValueError(f"decoded must be an int of at least 1, got {decoded!r}")
    task, parts = begin(model, inputs, tokenizer, decoded)
    dense, interrupted = Tally(), False
    candidates: list[Candidate] = []
    tallies: list[Tally] = []
    with Progress(progress) as shown, eval_mode(model):
        for number, part in enumerate(parts):
            shown.step("unpatched")
            try:
                if number == 0:
                    candidates = task.candidates(part, methods, budgets, bits)
                    tallies = [Tally() for _ in candidates]
                    if (total := count(inputs)) is not None:
                        shown.expect(total * sum(not each.reason for each in candidates))
                expected = task.read(part)
                task.add(dense, expected, None)
                for place, candidate in enumerate(candidates):
                    if candidate.reason:
                        continue
                    shown.step(candidate.label)
                    try:
                        if number == 0:
                            candidate = candidates[place] = task.fitted(part, candidate)
                        reading = task.read(part, candidate)
                        if number == 0:
                            candidates[place] = task.counted(candidate, reading)
                        task.add(tallies[place], reading, expected)
                    except Exception as error:
                        candidates[place] = refused(candidate, error)
                    shown.advance()
            except KeyboardInterrupt:
                if number == 0 and not dense.means():
                    raise
                interrupted = True
                break
    rows = [
        row_of(each, {} if each.reason else task.figures(tally, dense) if tally.means() else {})
        for each, tally in zip(candidates, tallies, strict=True)
    ]
    whole = Row("unpatched", "", figures=task.figures(dense, dense))
    return Result(task.title, task.measures, whole, tuple(rows), task.notes, interrupted)


def check(
    model: Any, methods: Methods, budgets: Sequence[float], bits: Sequence[int]
) -> tuple[float, ...]:
    """The budgets, descending, if the arguments can be tried.

    Raises:
        ValueError, TypeError: see evaluate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model must be a transformer, and {type(model).__name__} has no weights")
    if any(hasattr(vars(m).get("forward"), "tokred_original") for m in model.modules()):
        raise ValueError(
            "model is patched, and methods are measured beside the unpatched one: leave the patch"
        )
    check_methods(methods)
    check_bits(bits)
    if methods is not None and not methods and not bits:
        raise ValueError("methods must name a method at least, or be None for all that fit")
    return check_budgets(budgets)


def begin(
    model: nn.Module, inputs: Any, tokenizer: Any, decoded: int
) -> tuple[Task, Iterator[Any]]:
    """The task, by the model and the kind of its first input, and the parts that it reads: of a
    decoder Passages, of an encoder batches."""
    found = batches(inputs)
    first = next(found)
    named, name = inspect.signature(model.forward).parameters, type(model).__name__
    if "input_ids" in first and "pixel_values" in named and "input_ids" not in named:
        raise ValueError(f"inputs must be pixels for {name}, got token numbers")
    if "input_ids" not in first and is_decoder(model) and "pixel_values" not in named:
        raise ValueError(f"inputs must be token numbers for {name}, got pixels")
    task: Task
    if "input_ids" in first and is_decoder(model):
        task = DecoderTask(model, tokenizer, decoded)
    else:
        task = EncoderTask(model)
    return task, _parts(task, first, found)


def sized(task: Task, part: Any, candidate: Candidate) -> Candidate:
    """The candidate with its final options and, of an encoder, the tokens that they leave."""
    candidate = task.fitted(part, candidate)
    if isinstance(task, DecoderTask):
        return candidate
    return task.counted(candidate, task.read(part, candidate))


def _parts(task: Task, first: Batch, others: Iterator[Batch]) -> Iterator[Any]:
    for batch in chain([first], others):
        yield from task.parts(batch)


def is_decoder(model: nn.Module) -> bool:
    """Whether it is a language model that generates."""
    return hasattr(model, "generate") and bool(getattr(model, "can_generate", lambda: True)())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients; afterwards every part is as it was."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in before.items():
            module.training = training


def row_of(candidate: Candidate, figures: dict[str, float]) -> Row:
    """A row of the result; without figures or a reason, its reason is that it was not reached."""
    if not figures and not candidate.reason:
        candidate = replace(candidate, reason="interrupted before it was measured")
    return Row(
        candidate.label,
        candidate.method,
        candidate.options,
        candidate.budget,
        candidate.kept,
        figures,
        candidate.line,
        candidate.reason,
    )
