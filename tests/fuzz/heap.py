"""Whether memory grows from call to call: every op's heap after many calls is what it was."""

from __future__ import annotations

import time

import torch
from compare import Mismatch
from draw import Draw
from examine import CASES

from cases.heap_use import used

CALLS, LONGEST_S = 100_000, 120.0
WARM_UP = 200
MAX_BYTES = 4096  # what the allocator's own lists may take
_TRIED = 12


def examine(op: str, seed: int, calls: int = CALLS) -> None:
    """Calls a small case of the op many times.

    Raises:
        Mismatch: the heap has grown.
    """
    torch.set_num_threads(1)
    with torch.no_grad():
        case = _quickest(op, seed)
        for _ in range(WARM_UP):
            case.run(case.arguments)
        before, end, count = used(), time.monotonic() + LONGEST_S, 0
        while count < calls and time.monotonic() < end:
            for _ in range(100):
                case.run(case.arguments)
            count += 100
    grown = used() - before
    print(f"heap: {op}, {count} calls: {grown:+d} bytes", flush=True)
    if grown > MAX_BYTES:
        raise Mismatch(f"{grown} bytes more after {count} calls: {case}")


def _quickest(op: str, seed: int):
    """The fastest of a few cases that do something."""
    timed = []
    for number in range(_TRIED):
        case = CASES[op](Draw(op, 1000 * (seed + 1) + number, small=True))
        if case.refusable or (case.batched and not case.batch()):
            continue
        start = time.perf_counter()
        case.run(case.arguments)
        timed.append((time.perf_counter() - start, number, case))
    return min(timed)[2] if timed else CASES[op](Draw(op, 0, small=True))
