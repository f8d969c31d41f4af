"""What the machine can do, measured in the same run as the ops: bandwidths and arithmetic rates.

On the CPU by kernels of tokred._C, as the best of many rounds: read and copy stream over arrays
many times as large as the last cache (copy past the caches, copy_ordinary through them, both
counted as bytes read and written); gather_N_sorted and gather_N_shuffled read one row of N bytes in
eight of such an array; fma_float32 multiplies and adds in registers, dot_int16 and dot_int8 sum
products of integers there. _1_thread: on one thread. Beside them torch's own sum, copy_ and mm
(gemm_DTYPE); where torch is faster, that is the ceiling. On a GPU all of them are torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from .harness import Case, Row, Timing, run_case
from .machine import DTYPES, Run, available_bytes

ROW_BYTES = (64, 128, 256, 512, 1024)
ARRAYS_PER_CACHE = 8
ROUNDS = 15  # each way of prefetching three times
# A round of 0.2 ms fits into a time slice; of 8 ms, a busy machine never gives one undisturbed.
OPERATION_STEPS = 100_000
OPERATION_ROUNDS = 500
GEMM_SAMPLE_S = 0.05
OPERATIONS = {"fma_float32": "multiply_add", "dot_int16": "dot_int16", "dot_int8": "dot_int8"}


def is_arithmetic(name: str) -> bool:
    return name.startswith(("gemm", "fma", "dot"))


def array_bytes(cache_bytes: int) -> int:
    """The size of an array that no cache holds; two of them take a third of the memory at most."""
    wanted = max(ARRAYS_PER_CACHE * cache_bytes, 1 << 28)
    return min(wanted, available_bytes() // 6) >> 20 << 20


def row_of(
    run: Run, name: str, candidate: str, work: int, seconds: Sequence[float], threads: int
) -> Row:
    timing, arithmetic = Timing.of(seconds), is_arithmetic(name)
    role = "ours" if candidate.startswith("tokred") else "peer"
    return Row(
        bench="ceilings", case=name, distribution="", dtype="float32", shape=(),
        candidate=candidate, role=role, median_us=timing.median_s * 1e6,
        p20_us=timing.p20_s * 1e6, p80_us=timing.p80_s * 1e6, ratio_to_best_peer=None,
        bytes_moved=0 if arithmetic else work, flops=work if arithmetic else 0, ceiling_name="",
        ceiling_share=None, samples=timing.samples, timer=timing.timer, device=run.device,
        machine=run.machine, threads=threads, versions=run.versions, revision=run.revision,
        date=run.date, jitter=run.jitter, metrics={"best_us": min(seconds) * 1e6},
    )  # fmt: skip


def kernel_rows(
    run: Run, size: int, rounds: int = ROUNDS, steps: int = OPERATION_STEPS
) -> Iterator[Row]:
    """Rows of tokred._C's kernels, on arrays of `size` bytes; rounds of reads, copies, gathers."""
    from tokred import _C

    isa = _C.cpu_isa()
    several = dict.fromkeys((run.threads, 1))

    def name_of(name: str, threads: int) -> str:
        return name if threads == run.threads else f"{name}_1_thread"

    def row(name: str, threads: int, measured: tuple[int, list[float]]) -> Row:
        return row_of(run, name_of(name, threads), f"tokred._C, {isa}", *measured, threads)

    for threads in several:
        yield row("read", threads, _C.ceiling_read(isa, size, threads, rounds))
    for name, past_caches in (("copy", True), ("copy_ordinary", False)):
        for threads in several:
            measured = _C.ceiling_copy(isa, size, threads, rounds, past_caches)
            yield row(name, threads, measured)
    for row_bytes in ROW_BYTES:
        for order in ("sorted", "shuffled"):
            measured = _C.ceiling_gather(
                isa, size, row_bytes, run.threads, rounds, order == "shuffled"
            )
            yield row(f"gather_{row_bytes}_{order}", run.threads, measured)
    for name, what in OPERATIONS.items():
        for threads in several:
            measured = _C.ceiling_operations(isa, what, steps, threads, OPERATION_ROUNDS)
            if measured[0]:
                yield row(name, threads, measured)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def torch_rows(run: Run, size: int, repeats: int = 10) -> Iterator[Row]:
    """torch's own streams over arrays of the same size."""
    source = torch.ones(size // 4)
    yield row_of(run, "read", "torch sum", size, timed(source.sum, repeats), run.threads)
    target = torch.zeros_like(source)
    seconds = timed(lambda: target.copy_(source), repeats)
    yield row_of(run, "copy", "torch copy_", 2 * size, seconds, run.threads)


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
    return Case(
        "ceilings",
        f"gemm_{dtype}",
        (n, n, n),
        dtype,
        build,
        "randn",
        bytes_moved,
        2 * n**3,
        ceiling=f"gemm_{dtype}",
    )


def cuda_stream_cases() -> Iterator[Case]:
    size = 1 << 30

    def read() -> dict[str, Callable]:
        x = torch.ones(2 * size // 4, device="cuda")
        return {"torch sum": lambda: x.sum()}

    def copy() -> dict[str, Callable]:
        source = torch.ones(size // 4, device="cuda")
        target = torch.zeros_like(source)
        return {"torch copy_": lambda: target.copy_(source)}

    yield Case("ceilings", "read", (size // 2,), "float32", read, "ones", 2 * size)
    yield Case("ceilings", "copy", (size // 4,), "float32", copy, "ones", 2 * size)
    for row_bytes in ROW_BYTES:
        yield cuda_gather_case(row_bytes, 2 * size)


def cuda_gather_case(row_bytes: int, size: int) -> Case:
    """One row in eight, in order, summed by an embedding bag, which writes next to nothing."""
    rows, bag = size // row_bytes, 64
    picked = rows // 8

    def build() -> dict[str, Callable]:
        table = torch.ones(rows, row_bytes // 4, device="cuda")
        generator = torch.Generator().manual_seed(0)
        offsets = torch.randint(8, (picked,), generator=generator)
        indices = (torch.arange(picked) * 8 + offsets).view(-1, bag).to("cuda")
        return {"torch embedding_bag": lambda: F.embedding_bag(indices, table, mode="sum")}

    bytes_moved = picked * (row_bytes + 8) + picked // bag * row_bytes
    return Case(
        "ceilings",
        f"gather_{row_bytes}_sorted",
        (picked, row_bytes // 4),
        "float32",
        build,
        "one row in eight",
        bytes_moved,
    )


def rate(row: Row) -> float:
    """Operations or bytes per second of a row of this bench, in its best round."""
    work = row.flops if is_arithmetic(row.case) else row.bytes_moved
    return work / (row.metrics.get("best_us", row.p20_us) * 1e-6)


def best_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The fastest way that was measured, by ceiling."""
    rates: dict[str, float] = {}
    for row in rows:
        rates[row.case] = max(rates.get(row.case, 0.0), rate(row))
    return rates


def measure(run: Run) -> tuple[dict[str, float], list[Row]]:
    if run.device == "cuda":
        rows = [row for case in cuda_stream_cases() for row in run_case(case, run, {})]
    else:
        size = array_bytes(run.cache_bytes)
        rows = [*kernel_rows(run, size), *torch_rows(run, size)]
    for dtype in run.dtypes():
        rows += run_case(gemm_case(dtype, run.device), run, {})
    return best_rates(rows), rows
