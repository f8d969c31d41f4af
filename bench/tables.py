"""The tables of the benchmarks, in Markdown: a list of stored rows in, a table out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from .ceilings import is_arithmetic, rate
from .harness import Row

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def short(dtype: str) -> str:
    return SHORT.get(dtype, dtype)


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
        return row.residency.replace("_", " ")
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
                f"{row.case}: `{row.candidate}` [{shape}] {short(row.dtype)} {row.distribution}",
                f"{duration(row.median_us)} ({duration(row.p20_us)} – {duration(row.p80_us)})",
                f"{peer.candidate}, {duration(peer.median_us)}" if peer else "",
                f"**{row.ratio_to_best_peer:.2f}×**" if row.ratio_to_best_peer else "",
                share(row),
                f"{row.bytes_moved / 1e6:.1f} MB" if row.bytes_moved else "",
            ]
            if floor_names:
                cells.insert(4, f"{floor.median_us / row.median_us:.2f}×" if floor else "")
            lines.append(cells)
    header = [
        "op, shape, inputs",
        "median (p20 – p80)",
        "best peer",
        "speed-up",
        "of the ceiling",
        "moved",
    ]
    if floor_names:
        header.insert(4, f"beside {', '.join(sorted(floor_names))}")
    return table(header, lines)


def models_table(rows: Sequence[Row]) -> str:
    lines = []
    for group in groups(rows):
        for row in group:
            metrics, images = row.metrics, row.shape[0]
            cosines = (metrics.get(name) for name in ("cls_cosine", "patch_cosine"))
            lines.append(
                [
                    f"{row.case}, {row.shape[-1]} px, {short(row.dtype)}: {row.candidate}",
                    f"{metrics['tokens']:.0f}" if "tokens" in metrics else "",
                    duration(row.median_us / images),
                    f"**{row.ratio_to_best_peer:.2f}×**" if row.role == "ours" else "1",
                    *("" if cosine is None else f"{cosine:.4f}" for cosine in cosines),
                ]
            )
    return table(
        ["model", "tokens out", "per image", "speed-up", "CLS cosine", "patch cosine"], lines
    )


def overhead_table(rows: Sequence[Row]) -> str:
    """Calls by autograd mode in columns, then the imports."""
    calls = [r for r in rows if r.case == "call"]
    modes = list(dict.fromkeys(r.distribution for r in calls))
    names = list(dict.fromkeys(r.candidate for r in calls))
    at = {(r.candidate, r.distribution): duration(r.median_us) for r in calls}
    lines = [[f"`{name}`", *(at.get((name, mode), "") for mode in modes)] for name in names]
    imports = [
        [f"import {r.candidate}", duration(r.median_us), *[""] * (len(modes) - 1)]
        for r in rows
        if r.case == "import"
    ]
    return table(["one call on [1, 4, 8]", *modes], [*lines, *imports])


def cache_table(rows: Sequence[Row]) -> str:
    """Every candidate, peers as well."""
    lines = []
    for group in groups(rows):
        for row in group:
            ratio = f"{row.ratio_to_best_peer:.2f}×"
            lines.append(
                [
                    row.candidate,
                    str(row.shape[-1]),
                    f"{duration(row.median_us)} ({duration(row.p20_us)} – {duration(row.p80_us)})",
                    f"**{ratio}**" if row.role == "ours" else ratio,
                ]
            )
    header = [
        f"{rows[0].case}, {short(rows[0].dtype)}",
        "context",
        "a step (p20 – p80)",
        "to the best peer",
    ]
    return table(header, lines)


def real_model_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step, and what of them the profiler finds in weights, attention and
    choosing; the rest is overhead."""
    lines = []
    for group in groups(rows):
        for row in group:
            parts = [row.metrics[f"{part}_ms"] for part in ("weights", "attention", "choosing")]
            rest = row.median_us / 1e3 - sum(parts)
            ratio = f"{row.ratio_to_best_peer:.2f}×"
            lines.append(
                [
                    f"{row.candidate}, {short(row.dtype)}",
                    f"{row.shape[1] // 1024}k × {row.shape[0]}",
                    duration(row.median_us),
                    f"**{ratio}**" if row.role == "ours" else ratio,
                    *(f"{part:.1f}" for part in (*parts, rest)),
                ]
            )
    header = [rows[0].case, "context", "a step", "to SDPA", "weights, ms", "attention, ms",
              "choosing, ms", "rest, ms"]  # fmt: skip
    return table(header, lines)


def ceilings_table(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        unit = "GB/s"
        if is_arithmetic(row.case):
            unit = "Gop/s" if row.case.startswith("dot") else "GFLOP/s"
        return [row.case.replace("_", " "), row.candidate, f"{rate(row) / 1e9:.4g} {unit}"]

    return table(["ceiling", "measured with", "rate"], [cells(row) for row in rows])


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "topk": op_table,
    "score": op_table,
    "decode": op_table,
    "packed": op_table,
    "block_sparse": op_table,
    "match": op_table,
    "cluster": op_table,
    "selection": op_table,
    "merge": op_table,
    "segments": op_table,
    "gradients": op_table,
    "sparse_attn": op_table,
    "linear_attn": op_table,
    "models": models_table,
    "merging": models_table,
    "vision_language": op_table,
    "cache": cache_table,
    "real_model": real_model_table,
    "overhead": overhead_table,
    "ceilings": ceilings_table,
}


def caption(row: Row) -> str:
    torch_version = row.versions.get("torch", "?")
    threads = "" if row.device == "cuda" else f", {row.threads} threads"
    return f"*{row.machine}{threads}, torch {torch_version}, {row.date}, {row.revision}*"
