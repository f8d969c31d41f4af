"""The fuzzer: `python tests/fuzz/run.py ops --seconds 60`; docs/testing.md says what it looks for.

The same seeds make the same cases everywhere. Every failure prints a line that repeats it, a crash
and a hang as well; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import guard

TESTS = Path(__file__).resolve().parents[1]
# What `all` runs, and the share of the time that each gets.
SHARES = {
    "ops": 0.4, "simt": 0.2, "histories": 0.15, "files": 0.1, "failures": 0.05, "heap": 0.1,
}  # fmt: skip
BACKENDS = {"ops": "cpu", "simt": "simt", "cuda": "cuda"}
SLOWEST_CASE_S = 120
ALL_OPS_S = 3600  # the most that the heap of all ops, many calls each, may take
MAX_FAILURES = 20


def main() -> int:
    options = _parser().parse_args()
    if guard.loaded():
        faulthandler.enable()
        sys.path[1:1] = [str(TESTS), str(TESTS.parent / "python")]
        return _run(options)
    kinds = SHARES if options.kind == "all" else {options.kind: 1.0}
    statuses = [_supervise(kind, options, share * options.seconds) for kind, share in kinds.items()]
    return max(statuses)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["all", *SHARES, "cuda"])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--only", help="NAME, or NAME:SEED as a failure prints it")
    parser.add_argument("--part", default="1/1", help="N/M: the N-th of M parts of the names")
    parser.add_argument("--log", help=argparse.SUPPRESS)
    return parser


def _supervise(kind: str, options: argparse.Namespace, seconds: float) -> int:
    """Runs one kind in processes of its own; after a crash, goes on behind the case."""
    end, seed, status = time.monotonic() + seconds, options.seed, 0
    slowest = ALL_OPS_S if kind == "heap" else SLOWEST_CASE_S
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "case"
        while True:
            left = max(end - time.monotonic(), 0.0)
            log.write_text("")
            command = [sys.executable, __file__, kind, "--seconds", str(left), "--seed", str(seed)]
            command += ["--part", options.part, "--log", str(log)]
            command += ["--only", options.only] if options.only else []
            try:
                code = subprocess.run(
                    command, env=guard.environment(), timeout=left + slowest
                ).returncode
            except subprocess.TimeoutExpired:
                code = -signal.SIGALRM
            status = max(status, int(code != 0))
            case = log.read_text().strip()
            if code in (0, 1) or not case:
                return status
            why = "hangs" if code == -signal.SIGALRM else f"ends with {_ending(code)}"
            print(f"FAILED {case} {why}\n    {_repeat(kind, case)}", flush=True)
            seed = int(case.rpartition(":")[2]) + 1
            if options.only or time.monotonic() > end:
                return status


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _repeat(kind: str, case: str) -> str:
    return f"repeat: {sys.executable} tests/fuzz/run.py {kind} --only {case}"


def _run(options: argparse.Namespace) -> int:
    """Runs the cases, in the process with the allocator."""
    import torch

    torch.set_num_threads(1)
    names, examine = _subjects(options.kind)
    number, parts = (int(part) for part in options.part.split("/"))
    names = list(names)[number - 1 :: parts]
    if options.only:
        name, _, seed = options.only.partition(":")
        if name not in names:
            raise SystemExit(f"--only must be one of {', '.join(names)}, got {name}")
        names = [name]
        if seed:
            options.seconds, options.seed = 0.0, int(seed)
    return _loop(options, names, examine)


def _subjects(kind: str) -> tuple[Iterable[str], Callable[[str, int], object]]:
    """The names of a kind, and what examines one of them for a seed."""
    if kind in BACKENDS:
        from examine import CASES, Examiner

        return CASES, Examiner(BACKENDS[kind]).examine
    if kind == "heap":
        from heap import CASES, examine

        return CASES, examine
    if kind == "histories":
        from histories import examine
    elif kind == "files":
        from files import examine
    else:
        from failures import examine
    return [kind], examine


def _loop(
    options: argparse.Namespace, names: list[str], examine: Callable[[str, int], object]
) -> int:
    from compare import Mismatch

    log = os.open(options.log, os.O_WRONLY | os.O_CREAT) if options.log else None
    end, seed = time.monotonic() + options.seconds, options.seed
    cases, failed = Counter(), 0
    while True:
        for name in names:
            if seed > options.seed and (time.monotonic() > end or failed >= MAX_FAILURES):
                print(f"{options.kind}: {sum(cases.values())} cases, {failed} failed", flush=True)
                return int(failed > 0)
            if log is not None:
                os.pwrite(log, f"{name}:{seed}".encode().ljust(80), 0)
            try:
                examine(name, seed)
            except Exception as error:
                failed += 1
                if not isinstance(error, Mismatch):
                    traceback.print_exc()
                print(f"FAILED {name}:{seed}: {error}", flush=True)
                print(f"    {_repeat(options.kind, f'{name}:{seed}')}", flush=True)
            cases[name] += 1
        seed += 1


if __name__ == "__main__":
    sys.exit(main())
