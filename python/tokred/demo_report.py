"""How the parts of the demo on text report: rows of speed, tables, plots and files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SpeedRow:
    method: str
    context: int
    tokens_per_second: float
    speed_up: float  # over SDPA


def speed_rows(
    context: int, seconds: Mapping[str, Sequence[float]], baseline: str
) -> list[SpeedRow]:
    """From the seconds of every token of every method, the first of which warms up."""
    rates = {name: 1 / statistics.median(times[1:]) for name, times in seconds.items()}
    return [SpeedRow(name, context, rate, rate / rates[baseline]) for name, rate in rates.items()]


def publish(
    console: Any,
    report: Any,
    path: Path,
    save_plot: Callable[[Any, Path], None],
    tables: Iterable[Any],
    verdict: str,
) -> None:
    """Writes PATH.json and PATH.png, and prints the tables and the verdict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, results = path.with_suffix(".png"), path.with_suffix(".json")
    results.write_text(json.dumps(asdict(report), indent=2) + "\n")
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
    """Tokens per second of whatever the rows compare."""
    table = new_table("Decoding, one sequence", (what, "context", "tokens / s", "speed-up"))
    for row in rows:
        rate = f"{row.tokens_per_second:.1f}"
        table.add_row(row.method, str(row.context), rate, f"{row.speed_up:.2f}×")
    return table


# ---- Plots --------------------------------------------------------------------------------------


def new_figure(width: float, panels: int) -> tuple[Any, Sequence[Any]]:
    """A figure and its panels, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


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
