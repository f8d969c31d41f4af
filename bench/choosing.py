"""The tables of docs/choosing_a_method.md: what each kind of method gained, and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import demo_tables
from .demo_tables import Report
from .headline import newest
from .published import load_report
from .tables import caption, duration, fastest, groups, table


def encoders(report: Report) -> str:
    """The smallest, the middle and the most merging of every image size."""
    lines = []
    for size in sorted({row["image_size"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["image_size"] == size]
        lines += [
            [f"{size} px, r = {row['r']}", f"{row['tokens']}", f"**{row['speed_up']:.2f}×**",
             f"{row['cls_cosine']:.4f}", f"{row['patch_cosine']:.4f}"]
            for row in (rows[0], rows[len(rows) // 2], rows[-1])
        ]  # fmt: skip
    header = ["DINOv2 ViT-S/14, `tome`", "tokens left", "to SDPA", "CLS cosine", "patch cosine"]
    return table(header, lines)


def contexts_of(report: Report) -> list[int]:
    return list(dict.fromkeys(row["context"] for row in report["speed"]))


def speed_ups(report: Report, method: str) -> list[str]:
    """To the fastest peer, at each context."""
    found = {row["context"]: row["speed_up"] for row in report["speed"] if row["method"] == method}
    return [f"**{found[context]:.2f}×**" for context in contexts_of(report)]


def decode(report: Report) -> str:
    """Our own rows of the demo on text, with the perplexity of as many keys."""
    keys = report["plan"]["decode_keys"]
    cost = {f"{row['method']}, k = {keys}": f"{row['to_dense']:.3f}"
            for row in report["perplexity"] if row["keys"] == keys}  # fmt: skip
    ours = dict.fromkeys(row["method"] for row in report["speed"] if not row["is_peer"])
    lines = [[name, cost.get(name, ""), *speed_ups(report, name)] for name in ours]
    header = ["SmolLM2-135M", "perplexity to dense", *(f"at {c}" for c in contexts_of(report))]
    return table(header, lines)


def bits(report: Report) -> str:
    """Packed caches: bytes at the longest context, perplexity and speed."""
    longest = max(contexts_of(report))
    size = {row["bits"]: row["to_float16"] for row in report["memory"] if row["context"] == longest}
    cost = {row["bits"]: row["to_dense"] for row in report["perplexity"]
            if row["variant"] == "default"}  # fmt: skip
    lines = [
        [f"{b} bits", f"{size[b]:.2f}", f"{cost[b]:.3f}", *speed_ups(report, f"{b} bits")]
        for b in size
    ]
    header = ["SmolLM2-135M, `PackedCache`", "bytes to float16", "perplexity to dense"]
    return table([*header, *(f"at {c}" for c in contexts_of(report))], lines)


def ops(results: Path, bench: str, case: str) -> str:
    """All of one case of the quick run on the machine measured last."""
    rows = [row for row in newest(results) if row.bench == bench and row.case == case]
    lines = []
    for group in groups(rows):
        peer = fastest(group, "peer")
        lines += [
            [f"`{row.candidate}` {[*row.shape]}", f"{peer.candidate}, {duration(peer.median_us)}",
             duration(row.median_us), f"**{row.ratio_to_best_peer:.2f}×**"]
            for row in group if row.role == "ours" and peer
        ]  # fmt: skip
    if not lines:
        return "*Not measured yet: `make bench`.*\n"
    return f"{caption(rows[0])}\n\n{table([case, 'best peer', 'tokred', 'speed-up'], lines)}\n"


# By the name in the page, the demo's report and its table, or the bench and its case.
REPORTS: dict[str, tuple[str, Callable[[Report], str]]] = {
    "encoders": ("demo", encoders),
    "decode": ("text", decode),
    "bits": ("text_cache", bits),
}
CASES = {
    "keys": ("decode", "step"),
    "prefill": ("block_sparse", "causal 128x128 at 25%"),
    "diffusion": ("match", "plan_2d"),
}


def render(name: str, results: Path) -> str:
    if name in CASES:
        return ops(results, *CASES[name])
    stem, build = REPORTS[name]
    report = load_report(results / f"{stem}.json")
    if report is None:
        return "*Not measured yet: `make demo`.*\n"
    return f"{demo_tables.caption(report)}\n\n{build(report)}\n"
