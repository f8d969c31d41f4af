"""Writes the tables of README.md and docs/ from bench/results: `python -m bench.readme_tables`.

A table stands between <!-- table:NAME --> and <!-- /table -->; NAME is a bench (one of
tables.TABLES) of the quick run, NAME:full of the full one, headline, one of LISTS, those of
choosing.py as choosing:NAME, or demo, demo_text and demo_cache: the demo's reports, which are first
copied from demo_output where they are complete.
Results of an unknown revision or of changed files are refused, and then nothing is written.
Running it twice changes nothing; --check only says whether the pages are up to date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from . import choosing, demo_tables, methods_page, ops_page
from .demo_tables import Report
from .headline import headline
from .machine import RESULTS
from .published import collect_demo, load_report, load_rows
from .tables import TABLES, caption

ROOT = RESULTS.parent.parent
MARKED = re.compile(r"(<!-- table:([\w:]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
# Made from the package itself.
LISTS = {
    "methods": methods_page.overview,
    "methods:full": methods_page.page,
    "ops": ops_page.overview,
    "ops:full": ops_page.page,
}
# The report in bench/results, its tables, and the picture under them.
DEMOS: dict[str, tuple[str, Callable[[Report], list[str]], str]] = {
    "demo": ("demo", demo_tables.images, ""),
    "demo_text": ("text", demo_tables.text,
                  "Perplexity over the keys attended to, and tokens per second over the context"),
    "demo_cache": ("text_cache", demo_tables.cache, "Perplexity and bytes per token over the bits, "
                   "and tokens per second over the context"),
}  # fmt: skip


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def demo_page(name: str, results: Path) -> str:
    stem, tables_of, picture = DEMOS[name]
    report = load_report(results / f"{stem}.json")
    if report is None:
        return "*Not measured yet: `make demo`.*\n"
    parts = [demo_tables.caption(report), *tables_of(report)]
    if picture and (results / f"{stem}.png").exists():
        parts.append(f"![{picture}](../bench/results/{stem}.png)")
    return "\n\n".join(parts) + "\n"


def bench_page(name: str, results: Path) -> str:
    """All machines' tables of one bench, one under the other."""
    bench, _, mode = name.partition(":")
    if bench not in TABLES:
        known = ", ".join(("headline", *LISTS, *DEMOS, *TABLES))
        raise ValueError(f"table:{name}: the name must be one of {known}")
    parts = []
    for path in sorted(results.glob(f"*-{mode or 'quick'}.jsonl")):
        rows = [row for row in load_rows(path) if row.bench == bench]
        for device in sorted({row.device for row in rows}):
            chosen = [row for row in rows if row.device == device]
            parts.append(f"{caption(chosen[0])}\n\n{TABLES[bench](chosen)}\n")
    return "\n".join(parts) or "*Not measured yet: `make bench`.*\n"


def render(name: str, results: Path = RESULTS) -> str:
    if name == "headline":
        return headline(results)
    if name in LISTS:
        return LISTS[name]()
    group, _, part = name.partition(":")
    if group == "choosing" and part in (*choosing.CASES, *choosing.REPORTS):
        return choosing.render(part, results)
    return (demo_page if name in DEMOS else bench_page)(name, results)


def regenerate(text: str, results: Path = RESULTS) -> str:
    return MARKED.sub(lambda m: f"{m[1]}{render(m[2], results)}{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a page is stale")
    options = parser.parse_args()
    if not options.check:
        for path in collect_demo():
            print(f"collected {path.relative_to(ROOT)}")
    renewed = {page: regenerate(page.read_text()) for page in pages()}
    stale = [page for page, text in renewed.items() if text != page.read_text()]
    if options.check and stale:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        raise SystemExit(f"{names}: stale, run python -m bench.readme_tables")
    if not options.check:
        for page in stale:
            page.write_text(renewed[page])
            print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
