"""Figures from bench/results: `python -m bench.plot`.

MACHINE-MODE-BENCH.png: speed-up over the best peer, one bar per candidate of ours.
MACHINE-MODE-models.png: speed-up and class-token cosine over r.
Results of an unknown revision or of changed files are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from .harness import Row
from .machine import RESULTS
from .published import load_rows
from .tables import caption, groups, short

COLORS = {"float32": "#33658a", "float16": "#86bbd8", "bfloat16": "#f6ae2d", "int32": "#758e4f"}
BARS = (
    "topk",
    "score",
    "decode",
    "packed",
    "block_sparse",
    "match",
    "merge",
    "sparse_attn",
    "linear_attn",
    "cache",
)


def label(row: Row) -> str:
    shape = ",".join(map(str, row.shape))
    inputs = "" if row.distribution == "randn" else f" {row.distribution}"
    return f"{row.case} [{shape}]{inputs}\n{row.candidate}"


def note(row: Row) -> str:
    if not row.ceiling_share:
        return f" {row.ratio_to_best_peer:.3g}×   {row.residency}".rstrip()
    share = f"{row.ceiling_share:.0%} of {row.ceiling_name.split('_')[0]}"
    return f" {row.ratio_to_best_peer:.3g}×   {share}"


def bars(rows: Sequence[Row], path: Path) -> None:
    """Log scale: a peer twice as fast and one twice as slow are equally far from 1."""
    ours = [r for r in rows if r.role == "ours" and r.ratio_to_best_peer]
    ratios = [r.ratio_to_best_peer for r in ours]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(ours)), layout="constrained")
    places = range(len(ours))
    # From 1 to the ratio, so that a slower candidate points to the left.
    axes.barh(
        places,
        [ratio - 1 for ratio in ratios],
        left=1,
        height=0.72,
        color=[COLORS[r.dtype] for r in ours],
    )
    for place, row in zip(places, ours, strict=True):
        axes.text(max(row.ratio_to_best_peer, 1), place, note(row), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(ratios) * 0.9), max(max(ratios) * 4, 8))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [label(r) for r in ours], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g×"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("speed-up over the fastest peer")
    axes.set_title(f"{rows[0].bench}: {caption(rows[0]).strip('*')}", fontsize=9, loc="left")
    dtypes = dict.fromkeys(r.dtype for r in ours)
    axes.legend(
        handles=[Patch(color=COLORS[d], label=short(d)) for d in dtypes],
        loc="lower right",
        fontsize=8,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def curves(rows: Sequence[Row], path: Path) -> None:
    figure, (speed, quality) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for group in groups(rows):
        points = sorted((r for r in group if "r" in r.metrics), key=lambda r: r.metrics["r"])
        first = points[0]
        name = f"{first.case}, {first.shape[-1]} px, {short(first.dtype)}"
        x = [r.metrics["r"] for r in points]
        (line,) = speed.plot(x, [r.ratio_to_best_peer for r in points], "o-", label=name)
        judged = [r for r in points if "cls_cosine" in r.metrics]
        quality.plot(
            [r.metrics["r"] for r in judged],
            [r.metrics["cls_cosine"] for r in judged],
            "o-",
            color=line.get_color(),
        )
        quality.plot(
            [r.metrics["r"] for r in judged],
            [r.metrics["patch_cosine"] for r in judged],
            "s:",
            color=line.get_color(),
            alpha=0.6,
        )
    speed.axhline(1, color="black", linewidth=0.8)
    speed.set_ylabel("speed-up over the unpatched model")
    speed.legend(fontsize=8)
    quality.plot([], [], "o-", color="gray", label="class token")
    quality.plot([], [], "s:", color="gray", label="patch tokens, unmerged")
    quality.axhline(0.99, color="black", linewidth=0.8, linestyle="--")
    quality.set_ylabel("cosine to the unpatched model")
    quality.legend(fontsize=8)
    for axes in (speed, quality):
        axes.set_xlabel("r, tokens merged per layer")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption(rows[0]).strip("*"), fontsize=9)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw(results: Path = RESULTS) -> list[Path]:
    drawn = []
    for source in sorted(results.glob("*.jsonl")):
        rows = load_rows(source)
        for bench in (*BARS, "models"):
            chosen = [r for r in rows if r.bench == bench]
            if chosen:
                path = source.with_name(f"{source.stem}-{bench}.png")
                (curves if bench == "models" else bars)(chosen, path)
                drawn.append(path)
    return drawn


if __name__ == "__main__":
    for path in draw():
        print(path)
