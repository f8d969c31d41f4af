"""The emulated device catches what a GPU would get wrong, and its tensor cores multiply."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cases.inputs import wide

HERE = Path(__file__).parent

RIGHT = {
    "block_barrier", "second_barrier", "warp_barrier", "copy_wait", "cleared", "after_errors",
    "mma_bf16", "mma_f16", "partial_copy", "scans", "grid", "announced", "wgmma_bf16", "wgmma_f16",
    "much_shared", "all_shared", "mma_truncates", "mma_rounds",
}  # fmt: skip
WRONG = {
    "no_block_barrier", "no_second_barrier", "no_warp_barrier", "no_copy_wait", "not_cleared",
    "not_announced", "no_wgmma_wait",
}  # fmt: skip
ERRORS = {
    "divergent_barrier": "a block barrier that some threads never reach",
    "divergent_shuffle": "a warp collective that some lanes never reach",
    "shuffle_from_nobody": "a shuffle reads a lane that takes no part in it",
    "misaligned_ldmatrix": "ldmatrix at a misaligned address",
    "ldmatrix_outside": "ldmatrix reads outside shared memory",
    "deadlock": "every thread waits for another",
    "barrier_without_count": "a barrier in shared memory without a count",
    "wgmma_without_fence": "wgmma without a fence",
    "too_many_threads": "outside the limits of the hardware",
    "too_much_shared": "more shared memory than a block of this device may have",
}

FLAGS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.fixture(scope="module", params=["sanitized", *wide("plain")])
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("simt") / "harness_test"
    sources = [str(HERE / "harness_test.cpp"), str(HERE / "simt.cpp")]
    includes = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc'}"]
    flags = ["-std=c++20", "-DTOKRED_SIMT", *includes, *FLAGS[request.param]]
    subprocess.run([compiler, *flags, *sources, "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(line.split(" ", 1) for line in lines.splitlines())


def test_every_check_ran(outcome: dict[str, str]) -> None:
    assert outcome.keys() == RIGHT | WRONG | ERRORS.keys()


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_kernels_are_right(outcome: dict[str, str], name: str) -> None:
    assert outcome[name] == "right"


@pytest.mark.parametrize("name", sorted(WRONG))
def test_races_show(outcome: dict[str, str], name: str) -> None:
    assert outcome[name] == "wrong"


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_broken_rules_raise(outcome: dict[str, str], name: str) -> None:
    assert outcome[name].startswith("error: simt: ")
    assert ERRORS[name] in outcome[name]
