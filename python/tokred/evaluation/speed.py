"""What methods save in a model of one's own: end to end, beside the best dense practice."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from .candidates import Candidate, Methods, refused
from .decoding import DecoderTask, best_dense, cache_of, dense_attention, forward
from .encoding import EncoderTask, features
from .inputs import Batch
from .measure import peak_bytes, timed, where
from .progress import Progress
from .quality import BUDGETS, Task, begin, check, eval_mode, row_of, sized
from .results import Measure, Result, Row

Times: TypeAlias = tuple[list[float], list[float]]

TOKEN, SPEED, PROMPT, PROMPT_SPEED = "ms a token", "speed-up", "prompt ms", "prompt speed-up"
PROMPT_MB, CACHE_MB, STEP_MB = "prompt MB", "cache MB", "step MB"
FORWARD, FORWARD_MB = "ms", "MB"
_PROMPT_TURNS = 3  # at most, as a prompt takes long
_DECODING = (
    Measure(TOKEN, "lower"),
    Measure(SPEED, "higher", 3),
    Measure(PROMPT, "lower"),
    Measure(PROMPT_SPEED, "higher", 3),
    Measure(PROMPT_MB, "lower", 3),
    Measure(CACHE_MB, "lower", 3),
    Measure(STEP_MB, "lower", 3),
)
_ENCODING = (
    Measure(FORWARD, "lower"),
    Measure(SPEED, "higher", 3),
    Measure(FORWARD_MB, "lower", 3),
)


def benchmark(
    model: nn.Module,
    inputs: Any,
    methods: Methods = None,
    budgets: Sequence[float] = BUDGETS,
    *,
    bits: Sequence[int] = (),
    repeats: int = 8,
    progress: bool = True,
) -> Result:
    """What methods save in a model, in time and memory, each beside the best dense practice.

    Of a decoder of transformers: milliseconds of a token decoded after the prompt, and of reading
    the prompt, beside SDPA (eager attention where the model has none), which reads prompts without
    a mask and decodes into a StaticCache (no token copies the cache). Of an encoder: milliseconds
    of a forward pass, beside the unpatched model on SDPA. Memory is in MB, 10^6 bytes. Every method
    takes turns with the dense model, in one process; times are medians, and a speed-up is the ratio
    of two medians of the same turns.

    Args:
        inputs: as for tokred.evaluate; the first batch is what is measured.
        repeats: timed turns, after one that warms up.

    The other arguments, and the Result, are those of tokred.evaluate.

    Raises:
        ValueError, TypeError: as tokred.evaluate; repeats below 1.
    """
    budgets = check(model, methods, budgets, bits)
    check_repeats(repeats)
    task, parts = begin(model, inputs, None, 1)
    race: DecoderRace | EncoderRace
    with eval_mode(model):
        part = next(parts)
        candidates = task.candidates(part, methods, budgets, bits)
        if isinstance(task, DecoderTask):
            race = DecoderRace(model, part.context, repeats)
        else:
            race = EncoderRace(task, part, repeats)
        dense = race.dense()
        rows, interrupted = rows_of(task, part, candidates, race.run, progress)
    whole = Row(race.practice, "", figures=race.of_dense(dense))
    return Result(race.title, race.measures, whole, rows, race.notes, interrupted)


def check_repeats(repeats: int) -> None:
    """Raises unless it is a number of turns.

    Raises:
        ValueError: saying which.
    """
    if type(repeats) is not int or repeats < 1:
        raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")


def rows_of(
    task: Task,
    part: Any,
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], dict[str, float]],
    progress: bool,
) -> tuple[tuple[Row, ...], bool]:
    """A row for every candidate, with what `run` measures or the reason why it cannot; and whether
    Ctrl-C came in between."""
    found = list(candidates)
    figures: list[dict[str, float]] = [{} for _ in found]
    interrupted = False
    with Progress(progress, len(found)) as shown:
        try:
            for place, candidate in enumerate(candidates):
                if not candidate.reason:
                    shown.step(candidate.label)
                    try:
                        candidate = found[place] = sized(task, part, candidate)
                        figures[place] = run(candidate)
                    except Exception as error:
                        found[place] = refused(candidate, error)
                shown.advance()
        except KeyboardInterrupt:
            interrupted = True
    return tuple(map(row_of, found, figures)), interrupted


@dataclass(frozen=True)
class Step:
    """A call of a model inside a patch, whose entering is not timed."""

    patch: Callable[[], AbstractContextManager]
    call: Callable[[], object]

    def run(self) -> float:
        """Its seconds."""
        with self.patch():
            return timed(self.call)[1]


class Turns:
    """Seconds of the dense model, over all of its turns."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def beside(
        self, repeats: int, dense: Step, ours: Step, warm: bool = False
    ) -> tuple[float, float]:
        """The median seconds of both steps in turns, after one turn that warms up unless warm."""
        times: Times = ([], [])
        for _ in range(repeats + (not warm)):
            for found, step in zip(times, (dense, ours), strict=True):
                found.append(step.run())
        kept = [found[-repeats:] for found in times]
        self.seconds += kept[0]
        return statistics.median(kept[0]), statistics.median(kept[1])


class DecoderRace:
    """Decoding after a prompt, i64 [B, N], timed beside the dense model."""

    measures = _DECODING

    def __init__(self, model: nn.Module, prompt: Tensor, repeats: int) -> None:
        self.model, self.prompt, self.repeats = model, prompt, repeats
        self.dense_name = best_dense(model)
        attention = "SDPA" if self.dense_name == "sdpa" else "eager attention"
        self.practice = f"{attention}, StaticCache"
        self.turns, self.prompts = Turns(), Turns()
        self.title = (
            f"{type(model).__name__}: decoding after {prompt.shape[1]} tokens, batch "
            f"{prompt.shape[0]}"
        )
        self.notes = (
            f"Medians of {repeats} turns with {self.practice}, at most {_PROMPT_TURNS} for "
            f"prompts, on {where(prompt.device)}. MB: the most that prompt and step allocate, and "
            "the cache after the prompt.",
        )

    def dense(self) -> dict[str, float]:
        """Reads the prompt; the memory that it and a step take, by measure."""
        with dense_attention(self.model, self.dense_name):
            self.past = self.read(None)
            peak = peak_bytes(lambda: self.read(None))
            cache = self.static(1)
            step = peak_bytes(lambda: forward(self.model, self.prompt[:, -1:], cache))
        return {PROMPT_MB: peak / 1e6, CACHE_MB: held(cache) / 1e6, STEP_MB: step / 1e6}

    def of_dense(self, memory: dict[str, float]) -> dict[str, float]:
        """The figures of the dense model, over all turns."""
        seconds = self.turns.seconds or self._alone()
        prompts = self.prompts.seconds or [self._dense_prompt().run()]
        return {
            TOKEN: statistics.median(seconds) * 1e3, SPEED: 1.0,
            PROMPT: statistics.median(prompts) * 1e3, PROMPT_SPEED: 1.0, **memory,
        }  # fmt: skip

    def run(self, candidate: Candidate) -> dict[str, float]:
        """The figures of a method, in turns with the dense model."""
        with candidate.patch(self.model):
            peak = peak_bytes(lambda: self.read(candidate))  # also warms up
        caches: list[Any] = [None]

        def read() -> None:
            caches[0] = None  # makes room first
            caches[0] = self.read(candidate)

        dense_prompt, prompt = self.prompts.beside(
            min(self.repeats, _PROMPT_TURNS),
            self._dense_prompt(),
            Step(partial(candidate.patch, self.model), read),
            warm=True,
        )
        cache = caches[0]
        held_bytes = held(cache)
        static = self.static(self.repeats + 1)
        dense, ours = self.turns.beside(
            self.repeats, self.dense_step(static), self.step(cache, candidate)
        )
        with candidate.patch(self.model):
            step = peak_bytes(lambda: forward(self.model, self.prompt[:, -1:], cache))
        return {
            TOKEN: ours * 1e3, SPEED: dense / ours, PROMPT: prompt * 1e3,
            PROMPT_SPEED: dense_prompt / prompt, PROMPT_MB: peak / 1e6,
            CACHE_MB: held_bytes / 1e6, STEP_MB: step / 1e6,
        }  # fmt: skip

    def read(self, candidate: Candidate | None) -> Any:
        """A cache that has read the prompt."""
        cache = cache_of(self.model, candidate)
        forward(self.model, self.prompt, cache)
        return cache

    def step(self, cache: Any, candidate: Candidate) -> Step:
        """Decodes one more token with a method."""
        return Step(partial(candidate.patch, self.model), partial(self._decode, cache))

    def dense_step(self, cache: Any) -> Step:
        """Decodes one more token with the dense model."""
        patch = partial(dense_attention, self.model, self.dense_name)
        return Step(patch, partial(self._decode, cache))

    def _dense_prompt(self) -> Step:
        return Step(partial(dense_attention, self.model, self.dense_name), partial(self.read, None))

    def _decode(self, cache: Any) -> None:
        forward(self.model, self.prompt[:, -1:], cache)

    def static(self, steps: int) -> Any:
        """A StaticCache that holds the prompt, with room for so many steps."""
        from transformers import StaticCache

        length = self.prompt.shape[1] + steps
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        for number, layer in enumerate(self.past.layers):
            cache.update(layer.keys, layer.values, number)
        return cache

    def _alone(self) -> list[float]:
        step = self.dense_step(self.static(2))
        return [step.run() for _ in range(2)][1:]


class EncoderRace:
    """Forward passes over a batch, timed beside the unpatched model."""

    measures = _ENCODING
    practice = "unpatched, SDPA"

    def __init__(self, task: EncoderTask, part: Batch, repeats: int) -> None:
        self.model, self.part, self.repeats = task.model, part, repeats
        self.turns = Turns()
        shapes = ", ".join(str(list(x.shape)) for x in part.values())
        self.title = f"{type(self.model).__name__}: forward passes over {shapes}"
        self.notes = (
            f"Medians of {repeats} turns with the unpatched model, on {where(task.device)}. MB: "
            "the most that a pass allocates beside weights and input.",
        )

    def dense(self) -> dict[str, float]:
        """The memory that a pass takes, by measure."""
        return {FORWARD_MB: peak_bytes(self._forward) / 1e6}

    def of_dense(self, memory: dict[str, float]) -> dict[str, float]:
        """The figures of the unpatched model, over all turns."""
        seconds = self.turns.seconds or [self.dense_step().run() for _ in range(2)][1:]
        return {FORWARD: statistics.median(seconds) * 1e3, SPEED: 1.0, **memory}

    def run(self, candidate: Candidate) -> dict[str, float]:
        """The figures of a method, in turns with the unpatched model."""
        dense, ours = self.turns.beside(self.repeats, self.dense_step(), self.step(candidate))
        with candidate.patch(self.model):
            peak = peak_bytes(self._forward)
        return {FORWARD: ours * 1e3, SPEED: dense / ours, FORWARD_MB: peak / 1e6}

    def step(self, candidate: Candidate) -> Step:
        """A pass with a method."""
        return Step(partial(candidate.patch, self.model), self._forward)

    def dense_step(self) -> Step:
        """A pass of the unpatched model."""
        return Step(nullcontext, self._forward)

    def _forward(self) -> None:
        features(self.model, self.part)


def held(cache: Any) -> int:
    """The bytes of a cache's tokens, without the room for more."""
    if hasattr(cache, "nbytes"):
        return sum(_bytes(layer) for layer in cache.layers)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _bytes(layer: Any) -> int:
    if hasattr(layer, "nbytes"):
        found = layer.nbytes()
        return found.total - found.slack
    return sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)
