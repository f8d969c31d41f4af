"""The time and the memory of one call."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """The function's result, and the seconds that it took, work on a GPU included."""
    _wait()
    start = time.perf_counter()
    result = function()
    _wait()
    return result, time.perf_counter() - start


def where(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of the CPU"


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that the call holds at once, of what it allocates through torch: on the GPU
    where one is in use, on the CPU otherwise."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    with (
        quiet(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        function()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """Without the lines that torch's profiler writes to stderr by itself."""
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)
