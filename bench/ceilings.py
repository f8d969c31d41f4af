"""What the machine can do, measured in the same run as the kernels: bandwidths and gemm rates.

read, copy: streams over buffers far larger than the last cache. gather_N: rows of N floats at
random places, read and summed (an embedding bag writes next to nothing). gemm_DTYPE: one large
matrix product of torch. Each is a case of its own; its rate is bytes or flops over the median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .harness import Case, Row, run_case
from .machine import DTYPES, Run

ROW_FLOATS = (64, 128, 256, 768)
GEMM_SAMPLE_S = 0.05


def stream_bytes(device: str) -> int:
    return (1 << 30) if device == "cuda" else (1 << 27)


def read_case(device: str) -> Case:
    size = 2 * stream_bytes(device)

    def build() -> dict[str, Callable]:
        x = torch.ones(size // 4, device=device)
        return {"torch sum": lambda: x.sum()}

    return Case("ceilings", "read", (size // 4,), "float32", build, "ones", size, ceiling="read")


def copy_case(device: str) -> Case:
    size = stream_bytes(device)

    def build() -> dict[str, Callable]:
        source = torch.ones(size // 4, device=device)
        target = torch.zeros_like(source)
        return {"torch copy_": lambda: target.copy_(source)}

    return Case("ceilings", "copy", (size // 4,), "float32", build, "ones", 2 * size,
                ceiling="copy")


def gather_case(row_floats: int, device: str) -> Case:
    size = 2 * stream_bytes(device)
    rows = size // (4 * row_floats)
    picked, bag = rows // 4, 64
    picked -= picked % bag

    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        table = torch.ones(rows, row_floats, device=device)
        indices = torch.randperm(rows, generator=generator)[:picked].view(-1, bag).to(device)
        return {"torch embedding_bag": lambda: F.embedding_bag(indices, table, mode="sum")}

    name = f"gather_{row_floats}"
    bytes_moved = picked * (4 * row_floats + 8) + picked // bag * 4 * row_floats
    return Case("ceilings", name, (picked, row_floats), "float32", build, "random rows",
                bytes_moved, ceiling=name)


def gemm_size(dtype: str, device: str) -> int:
    """The largest friendly size whose product fits a sample: some machines emulate a dtype."""
    if device == "cuda":
        return 8192
    a = torch.ones(256, 256, dtype=DTYPES[dtype])
    a @ a
    start = time.perf_counter()
    a @ a
    rate = 2 * 256**3 / (time.perf_counter() - start)
    return next((n for n in (2048, 1536, 1024, 512) if 2 * n**3 / rate <= GEMM_SAMPLE_S), 256)


def gemm_case(dtype: str, device: str) -> Case:
    n = gemm_size(dtype, device)

    def build() -> dict[str, Callable]:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        return {"torch mm": lambda: torch.mm(a, b, out=out)}

    bytes_moved = 3 * n * n * DTYPES[dtype].itemsize
    return Case("ceilings", f"gemm_{dtype}", (n, n, n), dtype, build, "randn", bytes_moved,
                2 * n**3, ceiling=f"gemm_{dtype}")


def cases(run: Run) -> Iterator[Case]:
    yield read_case(run.device)
    yield copy_case(run.device)
    for row_floats in ROW_FLOATS:
        yield gather_case(row_floats, run.device)
    for dtype in run.dtypes():
        yield gemm_case(dtype, run.device)


def rate(row: Row) -> float:
    """Flops or bytes per second of a row of this bench."""
    work = row.flops if row.case.startswith("gemm") else row.bytes_moved
    return work / (row.median_us * 1e-6)


def measure(run: Run) -> tuple[dict[str, float], list[Row]]:
    rows = [row for case in cases(run) for row in run_case(case, run, {})]
    return {row.case: rate(row) for row in rows}, rows
