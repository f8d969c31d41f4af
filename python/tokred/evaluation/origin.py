"""Where and on what figures were measured."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tokred

# What changes no measurement: results, and the pages that are written from them.
_NOT_MEASURED = ("README.md", "docs", "bench/results")


@dataclass(frozen=True)
class Origin:
    """What all figures of a report have in common."""

    complete: bool  # False of a quick run, whose figures are not published
    cpu: str
    threads: int
    torch: str
    transformers: str
    python: str
    tokred: str
    revision: str
    date: str


def origin(complete: bool) -> Origin:
    """The origin of a report that is made here and now."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Origin(
        complete,
        f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}",
        torch.get_num_threads(),
        torch.__version__,
        _version("transformers"),
        platform.python_version(),
        tokred.__version__,
        revision(),
        today,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def revision() -> str:
    """The commit that tokred runs from, with "-dirty" where its files differ; or "unknown"."""
    package = Path(tokred.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) / "python" / "tokred" != package:
            return "unknown"  # installed somewhere inside another repository
        ignored = [f":(top,exclude){path}" for path in _NOT_MEASURED]
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *ignored)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    """The processor's name; only its kind where Linux does not tell it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
