"""Times callables side by side in one process and keeps one JSON line per result.

Candidates take turns, so drift of the machine's clock and its neighbours hits all of them alike.
A candidate's name starts with "tokred" where it is ours; every other one is a peer.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .machine import DTYPES, Run, percentiles

SHORTEST_SAMPLE_S = 2e-3
SLOW_CALL_S = 0.5
MIN_SAMPLES, MIN_SLOW_SAMPLES, MAX_SAMPLES = 5, 3, 101


@dataclass(frozen=True)
class Timing:
    median_s: float
    p20_s: float
    p80_s: float
    samples: int
    timer: str  # perf_counter | graph | events

    @classmethod
    def of(cls, samples: Sequence[float], timer: str = "perf_counter") -> Timing:
        p20, median, p80 = percentiles(samples)
        return cls(median, p20, p80, len(samples), timer)


@dataclass(frozen=True)
class Case:
    """One comparison. `build` makes the inputs and returns the candidates by name."""

    bench: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    build: Callable[[], dict[str, Callable[[], Any]]]
    distribution: str = "randn"
    bytes_moved: int = 0  # compulsory traffic: every input read once, every output written once
    flops: int = 0
    ceiling: str = ""  # a name of bench.ceilings
    floors: tuple[str, ...] = ()  # candidates that do less work: shown, never the best peer
    # Sees every candidate's first output; raises where they disagree, returns metrics by candidate.
    examine: Callable[[dict[str, Any]], dict[str, dict[str, float]]] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext  # held around the whole case
    sampler: type | None = None  # the device's own where None


@dataclass(frozen=True)
class Row:
    bench: str
    case: str
    distribution: str
    dtype: str
    shape: tuple[int, ...]
    candidate: str
    role: str  # ours | peer | floor
    median_us: float
    p20_us: float
    p80_us: float
    ratio_to_best_peer: float | None  # best peer's time over this one's: above 1 is faster
    bytes_moved: int
    flops: int
    ceiling_name: str
    ceiling_share: float | None
    samples: int
    timer: str
    device: str
    machine: str
    threads: int
    versions: dict[str, str]
    revision: str
    date: str
    jitter: float  # of the machine before the run, see `machine_jitter`
    residency: str = ""  # why there is no share of the memory's rate: what moves stays in the cache
    metrics: dict[str, float] = field(default_factory=dict)


class CpuSampler:
    """Repeats the callable until one sample is long enough for the clock."""

    timer = "perf_counter"

    def __init__(self, call: Callable[[], Any]):
        self.call, self.repeats = call, 1
        start = time.perf_counter()
        self.output = call()
        self.seconds = time.perf_counter() - start  # what one sample costs
        if self.seconds < SLOW_CALL_S:  # the first call warms up: it says nothing about the next
            self._calibrate()

    def _calibrate(self) -> None:
        while True:
            self.seconds = self.sample() * self.repeats
            if self.seconds >= SHORTEST_SAMPLE_S:
                return
            growth = math.ceil(1.2 * SHORTEST_SAMPLE_S / max(self.seconds, 1e-9))
            self.repeats *= min(max(growth, 2), 100)

    def sample(self) -> float:
        call, repeats = self.call, range(self.repeats)
        start = time.perf_counter()
        for _ in repeats:
            call()
        return (time.perf_counter() - start) / self.repeats


class CudaSampler:
    """Replays a CUDA graph between two events, after a write that evicts the L2 cache."""

    def __init__(self, call: Callable[[], Any]):
        self.output = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.launch, self.timer = self._captured(call)
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self.seconds = self.sample()

    @staticmethod
    def _captured(call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # the callable synchronises; its launch gaps are part of its time
            torch.cuda.synchronize()
            return call, "events"
        return graph.replay, "graph"

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        self.launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def turns(quotas: dict[str, int]) -> Iterable[str]:
    """Names in sampling order: each as often as its quota, evenly spread, first place rotating."""
    rounds = max(quotas.values(), default=0)
    names = list(quotas)
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            if (i + 1) * quotas[name] // rounds > i * quotas[name] // rounds:
                yield name


def quota(budget_s: float, sample_s: float) -> int:
    """How many samples of that length a candidate gets."""
    fewest = MIN_SLOW_SAMPLES if sample_s > SLOW_CALL_S else MIN_SAMPLES
    return min(max(int(budget_s / max(sample_s, 1e-9)), fewest), MAX_SAMPLES)


def compare(
    candidates: dict[str, Callable[[], Any]],
    budget_s: float = 2.0,
    examine: Callable[[dict[str, Any]], Any] | None = None,
    sampler: type = CpuSampler,
) -> dict[str, Timing]:
    """Median and 20th/80th percentile of each candidate, sampled alternately.

    The budget is shared evenly; a candidate too slow for it still gets the fewest samples.
    """
    samplers = {name: sampler(call) for name, call in candidates.items()}
    if examine:
        examine({name: s.output for name, s in samplers.items()})
    for s in samplers.values():
        s.output = None
    share = budget_s / max(len(samplers), 1)
    quotas = {name: quota(share, s.seconds) for name, s in samplers.items()}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    gc.collect()
    gc.disable()
    try:
        for name in turns(quotas):
            times[name].append(samplers[name].sample())
    finally:
        gc.enable()
    return {name: Timing.of(times[name], samplers[name].timer) for name in samplers}


def role(case: Case, candidate: str) -> str:
    if candidate in case.floors:
        return "floor"
    return "ours" if candidate.startswith("tokred") else "peer"


def binding_ceiling(case: Case, ceilings: dict[str, float]) -> str:
    """The case's own; of arithmetic, fused multiply-adds in float32 where those are faster.

    They are for a float32 product, and for other dtypes that the machine has no instructions for.
    """
    if not case.ceiling.startswith("gemm"):
        return case.ceiling
    names = (case.ceiling, "gemm_float32", "fma_float32")
    return max(names, key=lambda name: ceilings.get(name, 0))


def residency(case: Case, cache_bytes: int) -> str:
    """Whether what the case moves stays in the last cache from one call to the next."""
    if case.ceiling.startswith("gemm") or not case.bytes_moved:
        return ""
    if case.bytes_moved <= cache_bytes:
        return "fits L3"
    return "partly in L3" if case.bytes_moved < 2 * cache_bytes else ""


def ceiling_share(
    work: int, seconds: float, ceiling: float | None, name: str
) -> tuple[float | None, str]:
    """The share, or why there is none: a ceiling that was passed is none."""
    if not ceiling or not work:
        return None, ""
    share = work / seconds / ceiling
    return (share, "") if share <= 1 else (None, f"above {name}")


def run_case(case: Case, run: Run, ceilings: dict[str, float]) -> list[Row]:
    """Runs one case. `ceilings`: units (flops or bytes) per second by name."""
    metrics: dict[str, dict[str, float]] = {}

    def examine(outputs: dict[str, Any]) -> None:
        if case.examine:
            metrics.update(case.examine(outputs))

    sampler = case.sampler or (CudaSampler if run.device == "cuda" else CpuSampler)
    with case.context():
        timings = compare(case.build(), run.budget_s, examine, sampler)
    peers = [t.median_s for name, t in timings.items() if role(case, name) == "peer"]
    ceiling_name = binding_ceiling(case, ceilings)
    ceiling = ceilings.get(ceiling_name)
    work = case.flops if case.ceiling.startswith("gemm") else case.bytes_moved
    resident = residency(case, run.cache_bytes)

    def row(name: str, timing: Timing) -> Row:
        share, why = None, resident
        if not resident:
            share, why = ceiling_share(work, timing.median_s, ceiling, ceiling_name)
        return Row(
            bench=case.bench,
            case=case.name,
            distribution=case.distribution,
            dtype=case.dtype,
            shape=tuple(case.shape),
            candidate=name,
            role=role(case, name),
            median_us=timing.median_s * 1e6,
            p20_us=timing.p20_s * 1e6,
            p80_us=timing.p80_s * 1e6,
            ratio_to_best_peer=min(peers) / timing.median_s if peers else None,
            bytes_moved=case.bytes_moved,
            flops=case.flops,
            ceiling_name=ceiling_name,
            ceiling_share=share,
            samples=timing.samples,
            timer=timing.timer,
            device=run.device,
            machine=run.machine,
            threads=run.threads,
            versions=run.versions,
            revision=run.revision,
            date=run.date,
            jitter=run.jitter,
            residency=why,
            metrics=metrics.get(name, {}),
        )

    return [row(name, timing) for name, timing in timings.items()]


def load(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [Row(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def store(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the file's rows of the same benches on the same device; keeps all others."""
    renewed = {(row.bench, row.device) for row in rows}
    kept = [row for row in load(path) if (row.bench, row.device) not in renewed]
    lines = [json.dumps(dataclasses.asdict(row)) for row in [*kept, *rows]]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)


def tokens(
    shape: Sequence[int], dtype: str, device: str, distribution: str = "randn", seed: int = 0
) -> torch.Tensor:
    """Token tensors [B, N, C]: randn | correlated (a shared mean plus noise, as ViT keys are) |
    ties (every row one of 16 vectors, so that most similarities tie)."""
    generator = torch.Generator().manual_seed(seed)
    batch, count, channels = shape
    if distribution == "randn":
        x = torch.randn(shape, generator=generator)
    elif distribution == "correlated":
        mean = torch.randn(batch, 1, channels, generator=generator)
        x = mean + 0.3 * torch.randn(shape, generator=generator)
    elif distribution == "ties":
        book = torch.randn(16, channels, generator=generator)
        x = book[torch.randint(16, (batch, count), generator=generator)]
    else:
        raise ValueError(f"distribution must be randn, correlated or ties, not {distribution!r}")
    return x.to(device, DTYPES[dtype])


def agreement(tolerance: float) -> Callable[[dict[str, Any]], dict[str, dict[str, float]]]:
    """An `examine` that raises unless every candidate's first tensor is that of the first one."""

    def examine(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
        first = {n: (o if isinstance(o, torch.Tensor) else o[0]) for n, o in outputs.items()}
        expected_name, expected = next(iter(first.items()))
        for name, actual in first.items():
            error = (actual.double() - expected.double()).abs().max().item()
            if not error <= tolerance:
                raise RuntimeError(
                    f"{name} differs from {expected_name} by {error:.3g}, "
                    f"which is more than {tolerance:.3g}"
                )
        return {}

    return examine
