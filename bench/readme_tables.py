"""Writes the measured tables of README.md from bench/results: `python -m bench.readme_tables`.

A table stands between <!-- table:NAME --> and <!-- /table -->; NAME is a bench (topk, score,
decode, packed, block_sparse, match, merge, sparse_attn, models, cache, overhead, ceilings) of the
quick run, NAME:full of the full one, methods, or demo, demo_text and demo_cache: the demo's
reports, kept as demo.json, text.json and text_cache.json in bench/results. Running it twice changes
nothing; --check only says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from .harness import Row, load
from .machine import RESULTS

README = RESULTS.parent.parent / "README.md"
MARKED = re.compile(r"(<!-- table:([\w:]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def duration(microseconds: float) -> str:
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= scale:
            return f"{microseconds / scale:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, all others to the right."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, align, *lines])


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case, in stored order."""
    key = attrgetter("case", "shape", "dtype", "distribution")
    return [list(group) for _, group in groupby(rows, key)]


def fastest(group: Sequence[Row], role: str) -> Row | None:
    return min((r for r in group if r.role == role), key=lambda r: r.median_us, default=None)


def share(row: Row) -> str:
    if row.ceiling_share is None:
        return ""
    return f"{row.ceiling_share:.0%} of {row.ceiling_name.replace('_', ' ')}"


def op_table(rows: Sequence[Row]) -> str:
    """One line per candidate of ours."""
    floor_names = {r.candidate for r in rows if r.role == "floor"}
    lines = []
    for group in groups(rows):
        peer, floor = fastest(group, "peer"), fastest(group, "floor")
        for row in (r for r in group if r.role == "ours"):
            shape = ",".join(map(str, row.shape))
            cells = [
                f"{row.case}: `{row.candidate}` [{shape}] {SHORT[row.dtype]} {row.distribution}",
                f"{duration(row.median_us)} ({duration(row.p20_us)} – {duration(row.p80_us)})",
                f"{peer.candidate}, {duration(peer.median_us)}" if peer else "",
                f"**{row.ratio_to_best_peer:.2f}×**" if row.ratio_to_best_peer else "",
                share(row),
                f"{row.bytes_moved / 1e6:.1f} MB",
            ]
            if floor_names:
                cells.insert(4, f"{floor.median_us / row.median_us:.2f}×" if floor else "")
            lines.append(cells)
    header = ["op, shape, inputs", "median (p20 – p80)", "best peer", "speed-up", "of the ceiling",
              "moved"]
    if floor_names:
        header.insert(4, f"beside {', '.join(sorted(floor_names))}")
    return table(header, lines)


def models_table(rows: Sequence[Row]) -> str:
    lines = []
    for group in groups(rows):
        for row in group:
            metrics, images = row.metrics, row.shape[0]
            cosines = (metrics.get(name) for name in ("cls_cosine", "patch_cosine"))
            lines.append([
                f"{row.case}, {row.shape[-1]} px, {SHORT[row.dtype]}: {row.candidate}",
                f"{metrics['tokens']:.0f}" if "tokens" in metrics else "",
                duration(row.median_us / images),
                f"**{row.ratio_to_best_peer:.2f}×**" if row.role == "ours" else "1",
                *("" if cosine is None else f"{cosine:.4f}" for cosine in cosines),
            ])
    return table(["model", "tokens out", "per image", "speed-up", "CLS cosine", "patch cosine"],
                 lines)


def overhead_table(rows: Sequence[Row]) -> str:
    """Calls by autograd mode in columns, then the imports."""
    calls = [r for r in rows if r.case == "call"]
    modes = list(dict.fromkeys(r.distribution for r in calls))
    names = list(dict.fromkeys(r.candidate for r in calls))
    at = {(r.candidate, r.distribution): duration(r.median_us) for r in calls}
    lines = [[f"`{name}`", *(at.get((name, mode), "") for mode in modes)] for name in names]
    imports = [[f"import {r.candidate}", duration(r.median_us), *[""] * (len(modes) - 1)]
               for r in rows if r.case == "import"]
    return table(["one call on [1, 4, 8]", *modes], [*lines, *imports])


def ceilings_table(rows: Sequence[Row]) -> str:
    def rate(row: Row) -> str:
        gemm = row.case.startswith("gemm")
        work = row.flops if gemm else row.bytes_moved
        return f"{work / row.median_us / 1e3:.4g} {'GFLOP/s' if gemm else 'GB/s'}"

    return table(["ceiling", "measured with", "rate"],
                 [[r.case.replace("_", " "), r.candidate, rate(r)] for r in rows])


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "topk": op_table,
    "score": op_table,
    "decode": op_table,
    "packed": op_table,
    "block_sparse": op_table,
    "match": op_table,
    "merge": op_table,
    "sparse_attn": op_table,
    "models": models_table,
    "cache": op_table,
    "overhead": overhead_table,
    "ceilings": ceilings_table,
}


def demo_table(path: Path) -> str:
    """What `make demo` wrote to its results.json, kept as demo.json beside the other results."""
    if not path.exists():
        return "*Not measured yet: `make demo`.*\n"
    report = json.loads(path.read_text())
    lines = [
        [
            f"{row['image_size']} px, r = {row['r']}",
            str(row["tokens"]),
            f"{row['ms_unpatched']:.0f} ms",
            f"{row['ms_merged']:.0f} ms",
            f"**{row['speed_up']:.2f}×**",
            f"{row['cls_cosine']:.4f}",
            f"{row['patch_cosine']:.4f}",
        ]
        for row in report["rows"]
    ]
    header = ["size, tokens merged a layer", "tokens left", "SDPA", "tokred", "speed-up",
              "CLS cosine", "patch cosine"]
    return table(header, lines) + "\n"


def demo_text_table(path: Path) -> str:
    """What `make demo` wrote to its text.json."""
    if not path.exists():
        return "*Not measured yet: `make demo`.*\n"
    report = json.loads(path.read_text())
    count = report["plan"]["tokens"]
    quality = [
        ["every key", str(count), f"{report['dense_perplexity']:.3f}", "1"],
        *(
            [f"`{row['method']}`", str(row["keys"]), f"{row['perplexity']:.3f}",
             f"{row['to_dense']:.4f}"]
            for row in report["perplexity"]
        ),
    ]
    speed = [
        [row["method"], str(row["context"]), f"{row['tokens_per_second']:.1f}",
         f"**{row['speed_up']:.2f}×**"]
        for row in report["speed"]
    ]
    return "\n\n".join([
        table([f"perplexity of {count} tokens", "keys", "perplexity", "to dense"], quality),
        table(["decoding", "context", "tokens / s", "to SDPA"], speed),
    ]) + "\n"


def demo_cache_table(path: Path) -> str:
    """What `make demo` wrote to its text_cache.json."""
    if not path.exists():
        return "*Not measured yet: `make demo`.*\n"
    report = json.loads(path.read_text())
    ratio = {(row["bits"], row["variant"]): row["to_dense"] for row in report["perplexity"]}
    variants = list(dict.fromkeys(variant for _, variant in ratio))
    quality = [
        [str(bits), *(f"{ratio[bits, variant]:.4f}" for variant in variants)]
        for bits in dict.fromkeys(bits for bits, _ in ratio)
    ]
    contexts = list(dict.fromkeys(str(row["context"]) for row in report["speed"]))
    sizes: dict[str, list[str]] = {}
    for row in report["memory"]:
        cells = sizes.setdefault(f"{row['bits']} bits", [])
        cells.append(f"{row['bytes_per_token']:.0f} ({row['to_float16']:.2f}×)")
    rates: dict[str, list[str]] = {}
    for row in report["speed"]:
        cells = rates.setdefault(row["method"], [])
        cells.append(f"{row['tokens_per_second']:.1f} (**{row['speed_up']:.2f}×**)")
    return "\n\n".join([
        table(["perplexity to dense, bits", *variants], quality),
        table(["bytes per token (to float16) at", *contexts], [[n, *c] for n, c in sizes.items()]),
        table(["tokens / s (to SDPA) at", *contexts], [[n, *c] for n, c in rates.items()]),
    ]) + "\n"


def methods_table() -> str:
    """The registry of tokred.methods."""
    from tokred.methods import METHODS

    lines = [
        [f"`{m.name}`", f"[{m.title}](https://arxiv.org/abs/{m.arxiv})",
         m.summary + ("" if m.status == "exact" else f" ({m.status})")]
        for m in METHODS.values()
    ]
    rows = [["method", "paper", "what it does"], ["---"] * 3, *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def caption(row: Row) -> str:
    torch_version = row.versions.get("torch", "?")
    threads = "" if row.device == "cuda" else f", {row.threads} threads"
    return f"*{row.machine}{threads}, torch {torch_version}, {row.date}, {row.revision}*"


def render(name: str, results: Path = RESULTS) -> str:
    """All machines' tables of one name, one under the other."""
    if name == "demo":
        return demo_table(results / "demo.json")
    if name == "demo_text":
        return demo_text_table(results / "text.json")
    if name == "demo_cache":
        return demo_cache_table(results / "text_cache.json")
    if name == "methods":
        return methods_table()
    bench, _, mode = name.partition(":")
    if bench not in TABLES:
        raise ValueError(
            f"table:{name}: the name must be demo, demo_text, demo_cache, methods or one of "
            + ", ".join(TABLES)
        )
    parts = []
    for path in sorted(results.glob(f"*-{mode or 'quick'}.jsonl")):
        rows = [row for row in load(path) if row.bench == bench]
        for device in sorted({row.device for row in rows}):
            chosen = [row for row in rows if row.device == device]
            parts.append(f"{caption(chosen[0])}\n\n{TABLES[bench](chosen)}\n")
    return "\n".join(parts) or "*Not measured yet: `make bench`.*\n"


def regenerate(text: str, results: Path = RESULTS) -> str:
    return MARKED.sub(lambda m: f"{m[1]}{render(m[2], results)}{m[4]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the README is stale")
    options = parser.parse_args()
    text = README.read_text()
    renewed = regenerate(text)
    if options.check and renewed != text:
        raise SystemExit("README.md is stale: run python -m bench.readme_tables")
    if not options.check:
        README.write_text(renewed)


if __name__ == "__main__":
    main()
