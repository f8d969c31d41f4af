"""Half a minute of fuzzing; `make fuzz` takes an hour. docs/testing.md: how to repeat a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases.backends import SIMT_LIBRARY
from cases.inputs import wide

RUN = Path(__file__).with_name("run.py")


@pytest.mark.parametrize(
    ("kind", "part", "seconds"),
    [
        ("ops", "1/1", 12),
        ("simt", "1/1", 8),
        ("histories", "1/1", 4),
        ("files", "1/1", 3),
        ("failures", "1/1", 3),
        *wide(("ops", "1/2", 60), ("ops", "2/2", 60), ("simt", "1/2", 60), ("simt", "2/2", 60)),
    ],
)
def test_nothing_is_found(kind: str, part: str, seconds: int) -> None:
    if kind == "simt" and not SIMT_LIBRARY.exists():
        pytest.skip(f"{SIMT_LIBRARY} is not built")
    if kind in ("histories", "files", "failures"):
        pytest.importorskip("transformers")
    command = [sys.executable, str(RUN), kind, "--part", part, "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
