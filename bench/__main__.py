"""python -m bench --quick | --full [--only match,merge] [--device cuda] [--force]"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from pathlib import Path

import torch

from tokred._paths import check_file

from . import ceilings
from .harness import Row, run_case, store
from .machine import Run, start_run

BENCHES = (
    "topk",
    "score",
    "decode",
    "packed",
    "block_sparse",
    "match",
    "cluster",
    "selection",
    "merge",
    "segments",
    "gradients",
    "sparse_attn",
    "linear_attn",
    "overhead",
    "models",
    "merging",
    "vision_language",
    "cache",
    "real_model",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="mode",
        help="the main shapes, about five minutes on two cores (the default)",
    )
    mode.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="mode",
        help="more shapes, dtypes and input distributions, longer sampling",
    )
    parser.add_argument(
        "--only",
        default=",".join(BENCHES),
        metavar="NAMES",
        help=f"comma-separated, of {', '.join(BENCHES)}",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--force",
        action="store_true",
        help="run on a busy machine; stores nothing unless --out says where",
    )
    parser.add_argument("--out", type=Path, help="JSON lines file, in place of bench/results/")
    parser.set_defaults(mode="quick")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    unknown = set(options.only) - set(BENCHES)
    if unknown:
        parser.error(f"--only must be of {', '.join(BENCHES)}, got {', '.join(sorted(unknown))}")
    try:
        if options.out is not None:
            check_file("--out", options.out)
    except ValueError as error:
        parser.error(str(error))
    return options


def share(row: Row) -> str:
    if row.ceiling_share is None:
        return row.residency
    return f"{row.ceiling_share:6.1%} of {row.ceiling_name}"


def report(rows: list[Row]) -> None:
    first = rows[0]
    shape = ",".join(map(str, first.shape))
    print(f"\n{first.bench} {first.case} [{shape}] {first.dtype} {first.distribution}")
    for row in rows:
        ratio = f"{row.ratio_to_best_peer:6.2f}x" if row.ratio_to_best_peer else " " * 7
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
        print(
            f"  {row.candidate:38s} {row.median_us:11.1f} us  "
            f"[{row.p20_us:.1f}, {row.p80_us:.1f}]  {ratio}  {share(row)}  {metrics}".rstrip(),
            flush=True,
        )


def run_bench(name: str, run: Run, rates: dict[str, float]) -> list[Row]:
    module = importlib.import_module(f".bench_{name}", __package__)
    rows: list[Row] = []
    for case in module.cases(run):
        measured = run_case(case, run, rates)
        report(measured)
        rows += measured
    return rows


def report_ceilings(rows: list[Row]) -> None:
    for row in rows:
        unit = "Gop/s" if ceilings.is_arithmetic(row.case) else "GB/s"
        print(f"  {row.case:22s} {row.candidate:22s} {ceilings.rate(row) / 1e9:9.1f} {unit}")


def main() -> int:
    """Runs and stores one bench after the other; 1 where one of them failed."""
    options = arguments()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    run = start_run(options.device, options.mode, options.force)
    print(
        f"{run.machine}, {run.threads} threads, torch {run.versions['torch']}, "
        f"revision {run.revision}, jitter {run.jitter:.0%}, L3 {run.cache_bytes >> 20} MiB"
    )
    if run.revision.endswith("-dirty") or run.revision == "unknown":
        print(
            f"WARNING: tables and figures are not made of results at revision {run.revision}: "
            "commit first"
        )
    path = options.out or (None if options.force else run.path)
    print("ceilings", flush=True)
    rates, rows = ceilings.measure(run)
    report_ceilings(rows)
    failed = []
    for number, name in enumerate(("ceilings", *options.only)):
        if number:
            seconds = time.monotonic() - start
            print(f"\n[{number}/{len(options.only)}] {name}, after {seconds:.0f} s", flush=True)
            try:
                rows = run_bench(name, run, rates)
            except Exception:  # what the others measured is kept
                traceback.print_exc()
                failed.append(name)
                continue
        if path and rows:
            store(path, rows)
    print(f"\nwrote {path}" if path else "\nforced on a possibly busy machine: nothing stored")
    print(f"{time.monotonic() - start:.0f} s")
    if failed:
        print(f"FAILED: {', '.join(failed)}; their earlier results are unchanged")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
