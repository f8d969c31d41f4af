"""The machine a benchmark runs on: its name, whether it is idle, and the versions in use."""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from tokred.evaluation.origin import cpu_name, revision

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PACKAGES = (
    "tokred",
    "tomesd",
    "transformers",
    "timm",
    "flash_kmeans",
    "onnxruntime",
    "optimum-quanto",
)


@dataclass(frozen=True)
class Run:
    """What all rows of one run have in common."""

    device: str
    mode: str
    machine: str
    threads: int
    versions: dict[str, str]
    revision: str
    date: str
    jitter: float
    cache_bytes: int = 0  # the last cache, where it keeps what a call leaves in it for the next one

    @property
    def budget_s(self) -> float:
        """Sampling time for one case, shared by its candidates."""
        return 1.2 if self.mode == "quick" else 6.0

    @property
    def quick(self) -> bool:
        return self.mode == "quick"

    @property
    def path(self) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        return RESULTS / f"{slug}-{self.mode}.jsonl"

    def dtypes(self) -> list[str]:
        return ["float32", "bfloat16"] if self.quick else list(DTYPES)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th percentile."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def machine_jitter(threads: int) -> float:
    """How much longer a cache-resident job on all threads takes on average than in its good runs.

    The mean, because a neighbour steals whole time slices: most runs never see it.
    """
    a = torch.randn(256 * threads, 256)
    b, out = torch.randn(256, 256), torch.empty(256 * threads, 256)
    times = []
    for _ in range(400):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return statistics.fmean(times[20:]) / percentiles(times[20:])[0] - 1


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores that others kept busy while this process slept (Linux; 0 elsewhere)."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        idle = values[3] + values[4]
        return sum(values), idle

    if not Path("/proc/stat").exists():
        return 0.0
    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    elapsed = total_after - total
    return 1 - (idle_after - idle) / elapsed if elapsed else 0.0


def idle_gate(threads: int, force: bool = False, patience_s: float = 60.0) -> float:
    """Waits for an idle machine and returns its jitter; refuses a busy one unless forced."""
    deadline = time.monotonic() + (0 if force else patience_s)
    while True:
        busy, jitter = busy_share(), machine_jitter(threads)
        if busy < 0.1 and jitter < 0.4:
            return jitter
        complaint = f"{busy:.0%} of the cores busy, timing jitter {jitter:.0%}"
        if force:
            print(f"WARNING: the machine is not idle ({complaint}); do not quote these numbers")
            return jitter
        if time.monotonic() > deadline:
            raise SystemExit(f"the machine is not idle ({complaint}); stop the rest or use --force")
        time.sleep(2)


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}-core"


def last_cache_bytes() -> int:
    """All last-level caches of the processors that this process may use (Linux), or 32 MiB."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for index in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            level = int((index / "level").read_text())
            shared, size = (
                (index / name).read_text().strip() for name in ("shared_cpu_list", "size")
            )
            caches[level, shared] = int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or 32 << 20


def available_bytes() -> int:
    """Memory that can be had without swapping, within the control group's limit (Linux)."""
    limits = [int(1e18)]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        limits += [int(found.group(1)) << 10] if found else []
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and group.read_text().strip().isdigit():
        limits.append(int(group.read_text()))
    return min(limits)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def start_run(device: str, mode: str, force: bool = False) -> Run:
    threads = torch.get_num_threads()
    jitter = idle_gate(threads, force)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    # On a GPU, the L2 cache is emptied before every sample.
    cache_bytes = last_cache_bytes() if device == "cpu" else 0
    return Run(
        device,
        mode,
        machine_name(device),
        threads,
        versions(),
        revision(),
        today,
        round(jitter, 3),
        cache_bytes,
    )
