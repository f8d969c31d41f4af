"""Where the time of a model goes: weights, attention, choosing and the rest, with each method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .candidates import Candidate, Methods
from .decoding import DecoderTask
from .measure import quiet
from .quality import BUDGETS, begin, check, eval_mode
from .results import Measure, Result, Row
from .speed import DecoderRace, EncoderRace, Step, check_repeats, rows_of

TOTAL, WEIGHTS, ATTENTION = "ms", "weights ms", "attention ms"
CHOOSING, REST, OVERHEAD = "choosing ms", "rest ms", "overhead µs a layer"
_MEASURES = (
    Measure(TOTAL, "lower"),
    Measure(WEIGHTS, "", 3),
    Measure(ATTENTION, "lower", 3),
    Measure(CHOOSING, "", 3),
    Measure(REST, "", 3),
    Measure(OVERHEAD, "lower", 3),
)
# Ops of torch that are weights or attention: names begin with, or contain, one of these.
_MATRIX = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::_int_mm")
_WEIGHTS = ("convolution", "slow_conv", "_linear")
_SDPA = ("scaled_dot_product", "flash_attention", "efficient_attention")
# Ops of tokred that are attention, by parts of their names; all others choose, merge or pack.
_OURS = (
    "biased_attention", "sparse_attention", "packed_attention", "unmerged_attention",
    "combine_states", "linear_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Shares:
    """Seconds that one call spends in the ops of each kind."""

    weights: float
    attention: float
    choosing: float


def profile(
    model: nn.Module,
    inputs: Any,
    methods: Methods = None,
    budgets: Sequence[float] = BUDGETS,
    *,
    bits: Sequence[int] = (),
    repeats: int = 8,
    progress: bool = True,
) -> Result:
    """Where the time of a decoded token, or of an encoder's forward pass, goes, in ms.

    "Weights" is products with weight matrices, and convolutions; "attention" SDPA's or tokred's;
    "choosing" tokred's other ops, which score, choose, merge and pack; "rest" everything else,
    Python included. "Overhead" is, in µs per layer, how much longer choosing and the rest take than
    the rest of the dense model; negative where fewer tokens leave less to do.

    The total is the median of turns without a profiler; the parts are medians of passes under
    torch's profiler. Arguments and Result are those of tokred.benchmark.

    Raises:
        ValueError, TypeError: as tokred.benchmark.
    """
    budgets = check(model, methods, budgets, bits)
    check_repeats(repeats)
    task, parts = begin(model, inputs, None, 1)
    with eval_mode(model):
        part = next(parts)
        candidates = task.candidates(part, methods, budgets, bits)
        found = Profiler(task, model, part, repeats)
        rows, interrupted = rows_of(task, part, candidates, found.run, progress)
        whole = Row(found.race.practice, "", figures=found.dense())
    title = found.race.title.replace(": ", ": where the time goes, ", 1)
    return Result(title, _MEASURES, whole, rows, (found.note,), interrupted)


class Profiler:
    """One step of a decoder, or one pass of an encoder, taken apart."""

    def __init__(self, task: Any, model: nn.Module, part: Any, repeats: int) -> None:
        self.repeats = repeats
        self.race: DecoderRace | EncoderRace
        if isinstance(task, DecoderTask):
            self.race = race = DecoderRace(model, part.context, repeats)
            race.dense()
            self.layers = model.config.get_text_config().num_hidden_layers
        else:
            self.race, self.layers = EncoderRace(task, part, repeats), task.layers
        self.note = (
            f"Medians of {repeats} turns with {self.race.practice}; of {self.layers} layers. "
            "Choosing is scoring, choosing, merging and packing; overhead is what a method adds "
            "beside weights and attention."
        )

    def run(self, candidate: Candidate) -> dict[str, float]:
        """The figures of a method, in turns with the dense model."""
        step, dense = self._step(candidate), self._dense()
        theirs, ours = self.race.turns.beside(self.repeats, dense, step)
        own, others = self._shares(step), self._shares(dense)
        beside = ours - own.weights - own.attention
        added = beside - (theirs - others.weights - others.attention)
        return {**_figures(ours, own), OVERHEAD: added / self.layers * 1e6}

    def dense(self) -> dict[str, float]:
        """The figures of the dense model, over all turns."""
        dense = self._dense()
        seconds = self.race.turns.seconds or [dense.run() for _ in range(self.repeats + 1)][1:]
        return _figures(statistics.median(seconds), self._shares(dense))

    def _dense(self) -> Step:
        race = self.race
        if isinstance(race, EncoderRace):
            return race.dense_step()
        return race.dense_step(race.static(self.repeats + 1 + _PASSES))

    def _step(self, candidate: Candidate) -> Step:
        race = self.race
        if isinstance(race, EncoderRace):
            return race.step(candidate)
        with candidate.patch(race.model):
            cache = race.read(candidate)
        return race.step(cache, candidate)

    def _shares(self, step: Step) -> Shares:
        """The medians of a few passes under torch's profiler."""
        found = [profiled(step) for _ in range(_PASSES)]
        return Shares(*(statistics.median(each) for each in zip(*found, strict=True)))


_PASSES = 3


def profiled(step: Step) -> tuple[float, float, float]:
    """Seconds in ops that are weights, attention and choosing."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    activities = [ProfilerActivity.CPU]
    on_device = torch.cuda.is_initialized()
    if on_device:
        activities.append(ProfilerActivity.CUDA)
    with quiet(), step.patch(), recording(activities=activities) as recorded:
        step.call()
    seconds = dict.fromkeys(("weights", "attention", "choosing"), 0.0)
    for event in recorded.key_averages():
        kind = _kind(event.key)
        if kind is not None:
            took = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds[kind] += took / 1e6
    weights, attention, choosing = seconds.values()
    return weights, attention, choosing


def _kind(op: str) -> str | None:
    """What an op is for: "weights", "attention", "choosing", or None."""
    namespace, _, name = op.partition("::")
    if namespace == "tokred":
        return "attention" if any(part in name for part in _OURS) else "choosing"
    if any(part in op for part in _SDPA):
        return "attention"
    if op.startswith(_MATRIX) or any(part in op for part in _WEIGHTS):
        return "weights"
    return None


def _figures(total: float, shares: Shares) -> dict[str, float]:
    rest = total - shares.weights - shares.attention - shares.choosing
    return {
        TOTAL: total * 1e3,
        WEIGHTS: shares.weights * 1e3,
        ATTENTION: shares.attention * 1e3,
        CHOOSING: shares.choosing * 1e3,
        REST: rest * 1e3,
    }
