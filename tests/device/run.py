"""The device check: everything that only a GPU can tell, in ten minutes, the most valuable first.

`make device-check` on a machine with an H200, torch and nvcc; docs/testing.md says how to bring it
there. Writes device.jsonl and device.md after every step. `--device simt` rehearses it without one.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS_PY = Path(__file__).with_name("steps.py")
PACKED = ROOT / "build" / "device"
SPARE_S = 8  # for the page at the end


@dataclass(frozen=True)
class Step:
    """A step of steps.py and the most seconds that it may take; in the order of their value."""

    name: str
    seconds: int


STEPS = (
    Step("environment", 60),
    Step("load", 60),
    Step("wgmma", 60),
    Step("fp32", 60),
    Step("suite", 150),
    Step("kernels", 45),
    Step("memcheck", 90),
    Step("racecheck", 90),
    Step("bench-topk", 25),
    Step("bench-match", 25),
    Step("bench-merge", 20),
    Step("bench-decode", 25),
    Step("bench-sparse-decode", 25),
    Step("bench-packed-decode", 25),
    Step("bench-packed-qk-score", 25),
    Step("bench-kv-pack", 25),
    Step("bench-prefill", 30),
    Step("fuzz", 60),
)
BUILD = Step("build", 240)  # only where the libraries do not load


def main() -> int:
    options = _parser().parse_args()
    check = Check(options)
    names = [step.name for step in STEPS]
    chosen = names if options.steps is None else options.steps.split(",")
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise SystemExit(f"--steps must be of {', '.join(names)}, got {', '.join(unknown)}")
    for step in STEPS:
        if step.name not in chosen:
            continue
        passed = check.run(step)
        if step.name == "environment" and not passed and options.device == "cuda":
            check.run(BUILD)
            check.run(step)
    return int(check.failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "simt", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/device-out")))
    parser.add_argument("--budget", type=float, default=570, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=1, help="times the seconds of each step")
    parser.add_argument("--steps", help="comma-separated; all by default")
    parser.add_argument("--libraries", type=Path, help="the folder of the libraries")
    return parser


class Check:
    """The steps so far, their lines, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + options.budget
        self.failed = False
        options.out.mkdir(parents=True, exist_ok=True)
        self.lines = options.out / "device.jsonl"
        self.page = options.out / "device.md"
        self.log = options.out / "device.log"
        packed = PACKED if options.device == "cuda" else ROOT / "python" / "tokred" / "lib"
        self.libraries = options.libraries or packed
        for path in self.libraries.glob("*.xz"):  # as pack.py leaves them
            path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))

    def run(self, step: Step) -> bool:
        """Runs a step in a process of its own, within its time and what is left."""
        left = self.end - SPARE_S - time.monotonic()
        if left < 5:
            self._append({"step": step.name, "result": "no time left"})
            self._write_page()
            return False
        seconds, start = min(step.seconds * self.options.patience, left), time.monotonic()
        command = [sys.executable, str(STEPS_PY), step.name, "--device", self.options.device]
        command += ["--lines", str(self.lines), "--seconds", str(seconds)]
        environment = os.environ | {"TOKRED_LIBRARY_FOLDER": str(self.libraries.resolve())}
        result = self._result(command, environment, seconds)
        taken = round(time.monotonic() - start, 1)
        self._append({"step": step.name, "result": result, "seconds": taken})
        print(f"{step.name}: {result}, {taken} s", flush=True)
        self.failed |= result != "passed"
        self._write_page()
        return result == "passed"

    def _result(self, command: list[str], environment: dict[str, str], seconds: float) -> str:
        with self.log.open("ab") as log:
            log.write(f"\n== {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # what it started goes with it
                process.wait()
                return f"cut off after {seconds:.0f} s"
        return {0: "passed", 1: "failed"}.get(status, f"ended with status {status}")

    def _append(self, line: dict[str, Any]) -> None:
        with self.lines.open("a+") as file:
            file.seek(0)
            whole = file.read().endswith("\n")  # a step may be cut off in the middle of a line
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")

    def _write_page(self) -> None:
        lines = []
        for text in self.lines.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        self.page.write_text(page(lines))


def page(lines: list[dict[str, Any]]) -> str:
    """The lines in Markdown: results, what was found, failures, times."""
    parts = ["# Device check\n"]
    parts += _table(["step", "result", "seconds"], [line for line in lines if "result" in line])
    facts = [line for line in lines if line["step"] == "environment" and "result" not in line]
    parts += [f"{name}: {value}  " for line in facts for name, value in line.items()
              if name != "step"]  # fmt: skip
    totals = [line for line in lines if "tests" in line or "cases" in line or "kernels" in line]
    parts += ["", *(f"- {_without_step(line)}" for line in totals)]
    rows = [line for line in lines if "bench" in line]
    columns = ["case", "candidate", "us", "p20", "p80", "GB/s", "TFLOP/s"]
    for name in dict.fromkeys(row["bench"] for row in rows):
        parts += [f"\n## {name}\n"]
        parts += _table(columns, [row for row in rows if row["bench"] == name])
    failures = [line for line in lines if line.get("failed")]
    if failures:
        parts += ["\n## Failures\n"]
    for line in failures:
        parts += [f"- {line['step']}", "", "```", _without_step(line), "```", ""]
    return "\n".join(parts) + "\n"


def _without_step(line: dict[str, Any]) -> str:
    shown = {name: value for name, value in line.items() if name not in ("step", "failed")}
    return f"{line['step']}: " + ", ".join(f"{name} {value}" for name, value in shown.items())


def _table(columns: list[str], rows: list[dict[str, Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return "" if value is None else str(value)

    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    body = [f"| {' | '.join(cell(row.get(name)) for name in columns)} |" for row in rows]
    return [*head, *body, ""]


if __name__ == "__main__":
    sys.exit(main())
