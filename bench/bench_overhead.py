"""What a call costs before any kernel works, and what importing costs.

call: inputs so small that the kernel is noise. Each op as the public function and as the bare
torch.ops entry; torch.add on the same input is the dispatcher's own floor. The three cases differ
in the autograd mode of the caller. import: seconds of fresh interpreters.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

import tokred

from .harness import Case, CpuSampler
from .machine import Run

MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "grad mode": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
FLOOR = "torch.add"
IMPORT_CODE = """
import time
start = time.perf_counter()
import torch
torch_done = time.perf_counter()
import tokred
print(torch_done - start, time.perf_counter() - torch_done)
"""


class ReportedSampler:
    """For a callable that returns the seconds it measured itself."""

    timer = "perf_counter"

    def __init__(self, call: Callable[[], float]):
        self.call = call
        self.output = self.seconds = call()

    def sample(self) -> float:
        return self.call()


def small_calls(device: str) -> dict[str, Callable]:
    x = torch.randn(1, 4, 8, device=device)
    heads = torch.randn(1, 1, 4, 8, device=device)
    bias = torch.zeros(1, 1, 4, device=device)
    token_map = torch.tensor([[0, 1, 2, 0]], dtype=torch.int32, device=device)
    out, out_size = torch.zeros(1, 3, 8, device=device), torch.zeros(1, 3, device=device)
    ops = torch.ops.tokred
    return {
        "tokred.match": partial(tokred.match, x, x),
        "tokred op match": partial(ops.match.default, x, x),
        "tokred.bipartite_soft_matching": partial(tokred.bipartite_soft_matching, x, 1),
        "tokred op bipartite_soft_matching": partial(ops.bipartite_soft_matching.default, x, 1),
        "tokred.merge": partial(tokred.merge, x, token_map, 3),
        "tokred op merge": partial(ops.merge.default, x, token_map, 3),
        "tokred op merge_out": partial(
            ops.merge_out.default, x, token_map, None, None, "mean", out, out_size
        ),
        "tokred.biased_attention": partial(tokred.biased_attention, heads, heads, heads, bias),
        "tokred op biased_attention": partial(
            ops.biased_attention.default, heads, heads, heads, bias
        ),
        FLOOR: partial(torch.add, x, x),
    }


def call_case(mode: str, device: str) -> Case:
    return Case(
        "overhead",
        "call",
        (1, 4, 8),
        "float32",
        partial(small_calls, device),
        mode,
        floors=(FLOOR,),
        context=MODES[mode],
        sampler=CpuSampler,
    )


def import_seconds(which: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CODE], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[which])


def import_case() -> Case:
    def build() -> dict[str, Callable]:
        return {
            "tokred, after torch": partial(import_seconds, 1),
            "torch": partial(import_seconds, 0),
        }

    return Case(
        "overhead",
        "import",
        (),
        "",
        build,
        "fresh interpreter",
        floors=("torch",),
        sampler=ReportedSampler,
    )


def cases(run: Run) -> Iterator[Case]:
    for mode in MODES:
        yield call_case(mode, run.device)
    yield import_case()
