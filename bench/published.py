"""Which results may be published: those of a known commit, without changes on top, and whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .harness import Row, load
from .machine import RESULTS

DEMO_OUTPUT = RESULTS.parent.parent / "demo_output"
# What the demo writes, and what it is called in bench/results.
DEMO_FILES = {
    "results.json": "demo.json",
    "coffee.png": "merged_coffee.png",
    "text.json": "text.json",
    "text.png": "text.png",
    "text_cache.json": "text_cache.json",
    "text_cache.png": "text_cache.png",
}
PICTURE_OF = {"coffee.png": "results.json", "text.png": "text.json",
              "text_cache.png": "text_cache.json"}  # fmt: skip


class UnpublishableError(SystemExit):
    """Results that no table or figure is made of."""


def refuse(what: str, revision: str) -> None:
    """Raises where the revision does not say what was measured."""
    if revision.endswith("-dirty"):
        reason = f"measured at {revision}, with changes that no commit has: commit them"
    elif revision in ("", "unknown"):
        reason = "measured at an unknown revision: run from a git checkout"
    else:
        return
    raise UnpublishableError(f"not published: {what} was {reason}, and measure again")


def load_rows(path: Path) -> list[Row]:
    """All rows of a results file."""
    rows = load(path)
    for row in rows:
        refuse(f"{path.name}, {row.bench},", row.revision)
    return rows


def load_report(path: Path) -> dict[str, Any] | None:
    """What the demo reported, or None where there is no such file."""
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    origin = report.get("origin", {})
    refuse(path.name, origin.get("revision", ""))
    if not origin["complete"]:
        raise UnpublishableError(f"not published: {path.name} is of a quick run: run `make demo`")
    return report


def collect_demo(source: Path = DEMO_OUTPUT, results: Path = RESULTS) -> list[Path]:
    """Copies what `make demo` wrote to the results; quick runs stay where they are."""
    copied = []
    for name, kept in DEMO_FILES.items():
        report = source / PICTURE_OF.get(name, name)
        if not (source / name).exists() or not report.exists():
            continue
        origin = json.loads(report.read_text()).get("origin", {})
        if not origin.get("complete"):
            continue
        refuse(str(report), origin["revision"])
        shutil.copyfile(source / name, results / kept)
        copied.append(results / kept)
    return copied
