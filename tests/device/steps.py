"""One step of the device check, in a process of its own: `python steps.py NAME --lines FILE`.

A step appends JSON lines to the file as it goes, so that one that is cut off keeps what it had, and
exits with 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
sys.path[1:1] = [str(TESTS / "fuzz"), str(TESTS), str(ROOT / "python"), str(ROOT)]

# What the suite runs there, and the rehearsal; the wgmma kernel has a step of its own.
SUITE = ("match", "merge", "topk", "score", "sparse_attn", "linear_attn", "kv_pack", "packed_attn")
REHEARSED = ("sparse_attn/test_combine_states.py", "kv_pack/test_kv_unpack.py")


class Step:
    """Where a step runs, and where its lines go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name: str = options.name
        self.device: str = options.device
        self.seconds: float = options.seconds
        self.lines: Path = options.lines
        self.failed = 0

    @property
    def rehearsal(self) -> bool:
        return self.device != "cuda"

    def line(self, failed: bool = False, **fields: Any) -> None:
        self.failed += failed
        status = {"failed": True} if failed else {}
        with self.lines.open("a") as file:
            file.write(json.dumps({"step": self.name} | status | fields) + "\n")


def environment(step: Step) -> None:
    """What there is, and whether the libraries load."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "cores": os.cpu_count(), "glibc": platform.libc_ver()[1]}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "l2": properties.L2_cache_size}
        found["capability"] = list(torch.cuda.get_device_capability())
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        found[tool] = subprocess.run(["which", tool], capture_output=True).returncode == 0
    step.line(**found)
    import tokred

    paths = [str(path) for path in tokred._library.library_paths()]
    step.line(tokred=tokred.__version__, libraries=paths)
    if step.device == "cuda" and not any("cuda" in path for path in paths):
        step.line(failed=True, error="libtokred_cuda.so is not there, or torch has no CUDA")
    elif step.device == "cuda":
        tokred.topk(torch.randn(3, 50, device="cuda"), 5)
        torch.cuda.synchronize()


def build(step: Step) -> None:
    """The libraries, from source, into the folder that is looked in."""
    target = Path(os.environ["TOKRED_LIBRARY_FOLDER"])
    folder = ROOT / "build" / "device-build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DTOKRED_CUDA_ARCHITECTURES=90a-real"]
    compile_ = ["cmake", "--build", str(folder), "--parallel", "--target", "tokred", "tokred_cuda"]
    for command in (configure, compile_):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            step.line(failed=True, command=command, output=(done.stdout + done.stderr)[-3000:])
            return
    target.mkdir(parents=True, exist_ok=True)
    for name in ("libtokred.so", "libtokred_cuda.so"):
        (target / name).write_bytes((folder / name).read_bytes())


def load(step: Step) -> None:
    """One call of every op, against plain torch."""
    import torch
    from examine import CASES, Draw, Examiner

    examiner = Examiner(step.device)
    for op, make in CASES.items():
        with torch.no_grad():
            seeds = range(40)
            seed = next(s for s in seeds if _does_something(make(Draw(op, s, small=True))))
        _examine(step, examiner, op, seed, quiet=False)


def _does_something(case: Any) -> bool:
    from case import Tensor

    tensors = [v for v in case.arguments.values() if isinstance(v, Tensor)]
    # Calls that write to their arguments compare what they have written themselves.
    known = case.plain is not None or case.check is not None or bool(case.written)
    return known and not case.refusable and all(t.numel() > 2 for t in tensors)


def _examine(step: Step, examiner: Any, op: str, seed: int, quiet: bool) -> None:
    start = time.monotonic()
    try:
        examiner.examine(op, seed)
    except Exception as error:
        step.line(failed=True, op=op, seed=seed, error=f"{type(error).__name__}: {error}"[:1500])
    else:
        if not quiet:
            step.line(op=op, seed=seed, seconds=round(time.monotonic() - start, 3))


def fuzz(step: Step) -> None:
    """Random cases of all ops until the time is over."""
    from examine import CASES, Examiner

    examiner, counts = Examiner(step.device), Counter()
    end, seed = time.monotonic() + 0.8 * step.seconds, 100
    while time.monotonic() < end and step.failed < 30:
        for op in CASES:
            if time.monotonic() < end:
                _examine(step, examiner, op, seed, quiet=True)
                counts[op] += 1
        seed += 1
    step.line(cases=sum(counts.values()), failures=step.failed)


def _pytest(step: Step, *arguments: str) -> None:
    import pytest

    os.environ["TOKRED_BACKEND"] = {"cpu": "cpu-generic"}.get(step.device, step.device)
    counts: Counter[str] = Counter()

    class Lines:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                counts[report.outcome] += 1
                if report.failed:
                    step.line(failed=True, test=report.nodeid, error=report.longreprtext[-1500:])
                elif sum(counts.values()) % 200 == 0:
                    step.line(so_far=dict(counts))

    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS / "device"), *sys.path[1:5]])
    sys.path.insert(1, str(TESTS / "device"))
    status = pytest.main(["-q", "-p", "only_backend", "-p", "no:cacheprovider", *arguments],
                         plugins=[Lines()])  # fmt: skip
    step.line(failed=status != 0, status=int(status), tests=dict(counts))


def _files(step: Step, names: tuple[str, ...]) -> list[str]:
    return [f"tests/{name}" for name in (REHEARSED if step.rehearsal else names)]


def wgmma(step: Step) -> None:
    """The tests of the wgmma kernel."""
    if step.device == "cpu":
        step.line(skipped="the CPU has no wgmma")
        return
    os.environ["TOKRED_WGMMA"] = "1"
    chosen = ["-k", "queries_without_keys"] if step.rehearsal else []
    _pytest(step, "tests/sparse_attn/test_wgmma.py", *chosen)


def fp32(step: Step) -> None:
    """Attention and matching in float32, which is made of three bf16 products."""
    attention = ("biased_attention", "biased_attention_decode")
    names = ("match/test_match.py", *(f"sparse_attn/test_{name}.py" for name in attention))
    files = _files(step, names)
    _pytest(step, *files, "-k", "not float16")


def suite(step: Step) -> None:
    """The op tests' cases of the device."""
    workers = [] if step.rehearsal else ["-n", "8"]
    _pytest(step, *_files(step, SUITE), "--ignore=tests/sparse_attn/test_wgmma.py", *workers)


def _calls(step: Step, check: bool) -> None:
    """One call for every kernel; beside the CPU's results, or alone."""
    import torch
    from case import on_device
    from kernels import CALLS, wgmma

    where = "cuda" if step.device == "cuda" else "cpu"
    for call in CALLS:
        with wgmma(call.wgmma), on_device(step.device == "simt"):
            try:
                out = call.run(where)
                if where == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                step.line(failed=True, call=call.name, error=f"{type(error).__name__}: {error}")
                continue
        if check:
            _compare(step, call, out)


def _compare(step: Step, call: Any, out: Any) -> None:
    from compare import flat

    worst = 0.0
    for a, b in zip(flat(out), flat(call.run("cpu")), strict=True):
        a, b = a.cpu().double(), b.double()
        a, b = (x.nan_to_num(0, 1e30, -1e30) for x in (a, b))
        if a.numel():
            worst = max(worst, float(((a - b).abs() / (1 + b.abs().max())).max()))
    step.line(failed=not worst <= 2e-2, call=call.name, difference=float(f"{worst:.2g}"))


def kernels(step: Step) -> None:
    """Every kernel beside the CPU, and whether the profiler saw it."""
    from kernels import CALLS

    _calls(step, check=True)
    if step.device != "cuda":
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        _calls(step, check=False)
    seen = " ".join(event.key for event in recorded.key_averages())
    expected = {kernel for call in CALLS for kernel in call.kernels}
    missing = sorted(kernel for kernel in expected if kernel not in seen)
    step.line(failed=bool(missing), kernels=len(expected), not_launched=missing)


def _sanitized(step: Step, tool: str) -> None:
    """This program's calls under the sanitizer."""
    command = [sys.executable, __file__, "calls", "--device", step.device]
    command += ["--lines", str(step.lines)]
    if step.device == "cuda":
        watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
        command = [*watch, "--print-limit", "20", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    report = "\n".join(text for text in said.splitlines() if text.startswith("========="))
    found = {"tool": tool, "status": done.returncode, "report": report[-4000:]}
    step.line(failed=done.returncode != 0, **found, output=said[-500:])


def memcheck(step: Step) -> None:
    _sanitized(step, "memcheck")


def racecheck(step: Step) -> None:
    _sanitized(step, "racecheck")


def calls(step: Step) -> None:
    """What the sanitizers watch."""
    _calls(step, check=False)


def bench(step: Step) -> None:
    """bench-NAME: times beside torch."""
    from benches import measure
    from case import on_device

    name = step.name.removeprefix("bench-").replace("-", "_")
    where = "cuda" if step.device == "cuda" else "cpu"
    with on_device(step.device == "simt"):
        for row in measure(name, where, step.rehearsal, 1.5):
            step.line(**row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--device", choices=["cuda", "simt", "cpu"], default="cuda")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    step = Step(parser.parse_args())
    if step.device == "simt" and step.name != "build":
        from examine import Examiner

        Examiner("simt")  # loads the emulated device
    run: Callable[[Step], None] = bench if step.name.startswith("bench-") else globals()[step.name]
    run(step)
    return int(step.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
