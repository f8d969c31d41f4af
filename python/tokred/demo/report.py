"""How the parts of the demo report: rows of speed, tables, plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokred.evaluation.origin import origin

# ---- Speed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeedRow:
    """How fast a method decodes with a context of so many tokens."""

    method: str
    context: int
    milliseconds: float  # a token
    tokens_per_second: float
    speed_up: float  # over the fastest peer
    is_peer: bool  # dense attention and caches that are not ours


def speed_rows(
    context: int, seconds: Mapping[str, Sequence[float]], peers: Sequence[str]
) -> list[SpeedRow]:
    """From the seconds of every token of every method, the first of which warms up."""
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    best = min(medians[name] for name in peers)
    return [
        SpeedRow(name, context, median * 1e3, 1 / median, best / median, name in peers)
        for name, median in medians.items()
    ]


def publish(
    console: Any,
    report: Any,
    path: Path,
    complete: bool,
    save_plot: Callable[[Any, Path], None],
    tables: Iterable[Any],
    verdict: str,
) -> None:
    """Writes PATH.json, with its origin, and PATH.png, and prints the tables and the verdict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, results = path.with_suffix(".png"), path.with_suffix(".json")
    results.write_text(
        json.dumps({"origin": asdict(origin(complete)), **asdict(report)}, indent=2) + "\n"
    )
    save_plot(report, picture)
    for part in (*tables, verdict):
        console.print(part)
    console.print("written:", f"{picture}, {results}")


# ---- Tables -------------------------------------------------------------------------------------


def new_table(title: str, headings: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def perplexity_table(
    title: str, headings: tuple[str, str], rows: Iterable[tuple[str, int, float, float | None]]
) -> Any:
    """Rows of what the headings name, perplexity and its ratio to the dense one, None for that."""
    table = new_table(title, (*headings, "perplexity", "to dense"))
    for name, number, perplexity, ratio in rows:
        share = "1" if ratio is None else f"{ratio:.4f}"
        table.add_row(name, str(number), f"{perplexity:.3f}", share)
    return table


def speed_table(what: str, rows: Sequence[SpeedRow]) -> Any:
    """Tokens per second of whatever the rows compare; peers by name alone, ours with a star."""
    headings = (what, "context", "tokens / s", "to best dense")
    table = new_table("Decoding, one sequence (* tokred)", headings)
    for row in rows:
        name = row.method if row.is_peer else f"* {row.method}"
        rate = f"{row.tokens_per_second:.1f}"
        table.add_row(name, str(row.context), rate, f"{row.speed_up:.2f}×")
    return table


def speed_verdict(rows: Sequence[SpeedRow]) -> str:
    """Our fastest at the longest context, beside the fastest peer there."""
    longest = max(row.context for row in rows)
    here = [row for row in rows if row.context == longest]
    best = max((row for row in here if not row.is_peer), key=lambda row: row.speed_up)
    peer = max((row for row in here if row.is_peer), key=lambda row: row.speed_up)
    return (
        f"{best.method}: {best.speed_up:.2f}× the tokens per second of {peer.method}, the best "
        f"dense practice, at {longest} tokens"
    )


# ---- Plots --------------------------------------------------------------------------------------


def plot_lines(
    axes: Any, rows: Sequence[Any], by: str, x: str, y: str, label: str = "{}", unit: float = 1
) -> None:
    """A line for each value of a field, of two others."""
    for value in dict.fromkeys(getattr(row, by) for row in rows):
        line = [row for row in rows if getattr(row, by) == value]
        heights = [getattr(row, y) / unit for row in line]
        axes.plot([getattr(row, x) for row in line], heights, "o-", label=label.format(value))


def mark_dense(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color="black", linewidth=0.8, label=label)


def plot_speed(axes: Any, rows: Sequence[SpeedRow]) -> None:
    """Tokens per second over the context."""
    plot_lines(axes, rows, "method", "context", "tokens_per_second")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("tokens decoded per second")


def save_figure(figure: Any, title: str, path: Path) -> None:
    for axes in figure.axes:
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
