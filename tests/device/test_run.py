"""The device check, rehearsed where there is no device; and that it leaves out no kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cases.backends import SIMT_LIBRARY
from cases.inputs import wide
from device import run

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc"


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Of a machine that may be busy with the other tests.
    patience = ("--patience", "8", "--budget", "500")
    command = [sys.executable, str(HERE / "run.py"), "--out", str(out), *patience, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def lines(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "device.jsonl").read_text().splitlines()]


def results(out: Path) -> dict[str, str]:
    return {line["step"]: line["result"] for line in lines(out) if "result" in line}


def test_rehearsal(tmp_path: Path) -> None:
    """On the CPU kernels, with steps of every sort."""
    steps = ("environment", "kernels", "bench-topk")
    done = check(tmp_path, "--device", "cpu", "--steps", ",".join(steps))
    log = (tmp_path / "device.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-3000:]}"
    assert results(tmp_path) == dict.fromkeys(steps, "passed")
    page = (tmp_path / "device.md").read_text()
    assert f"torch: {torch.__version__}" in page and "## topk" in page and "## Fail" not in page
    candidates = {line["candidate"] for line in lines(tmp_path) if "bench" in line}
    assert candidates == {"tokred, by score", "tokred, by position", "torch.topk"}


@pytest.mark.parametrize("steps", ["wgmma", *wide("wgmma,bench-kv-pack")])
def test_rehearsal_on_the_emulated_device(tmp_path: Path, steps: str) -> None:
    if not SIMT_LIBRARY.exists():
        pytest.skip(f"{SIMT_LIBRARY} is not built")
    done = check(tmp_path, "--device", "simt", "--steps", steps)
    assert done.returncode == 0, f"{done.stdout}{(tmp_path / 'device.log').read_text()[-3000:]}"
    tests = [line["tests"] for line in lines(tmp_path) if "tests" in line]
    assert tests and tests[0]["passed"] > 0 and tests[0].get("failed", 0) == 0


FAKE_STEP = """
import sys, time
name, lines = sys.argv[1], sys.argv[sys.argv.index("--lines") + 1]
with open(lines, "a") as file:
    print('{"step": "%s", "bench": "topk", "case": "a row", "us": 4.5}' % name, file=file)
    file.write('{"step": "cut of')
    file.flush()
    time.sleep(60 if name == "wgmma" else 0)
    file.write('f"}\\\\n')
sys.exit(3 if name == "load" else 0)
"""


def test_what_is_cut_off_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE_STEP.replace("\\\\n", "\\n"))
    monkeypatch.setattr(run, "STEPS_PY", fake)
    options = run._parser().parse_args(["--device", "cpu", "--out", str(tmp_path / "out")])
    todo = run.Check(options)
    assert not todo.run(run.Step("load", 30))  # goes on after a step that dies
    start = time.monotonic()
    assert not todo.run(run.Step("wgmma", 1))
    assert time.monotonic() - start < 20
    assert todo.run(run.Step("suite", 30))
    todo.end = time.monotonic()
    assert not todo.run(run.Step("fuzz", 30))
    page = (tmp_path / "out" / "device.md").read_text()
    for result in ("ended with status 3", "cut off after 1 s", "passed", "no time left"):
        assert f"| {result} |" in page
    assert page.count("| a row |") >= 2 and todo.failed


def test_unknown_steps_are_refused(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cpu", "--steps", "load,speed")
    assert done.returncode != 0 and "got speed" in done.stderr


def test_the_steps_fit_the_budget_in_order() -> None:
    names = [step.name for step in run.STEPS]
    assert names[:3] == ["environment", "load", "wgmma"]
    assert names.index("memcheck") < names.index("bench-topk")


def test_every_kernel_has_a_call() -> None:
    sources = "".join(path.read_text() for path in CUDA_SOURCES.rglob("*.cu*"))
    defined = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", sources))
    listed = set(
        re.findall(
            r"\b(\w+_kernel)\b", "".join(path.read_text() for path in HERE.glob("kernels*.py"))
        )
    )
    assert defined == listed and len(defined) > 40
