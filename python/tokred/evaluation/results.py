"""What was measured: rows of methods beside the dense model, as a table, plot, JSON and page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .origin import Origin, origin


@dataclass(frozen=True)
class Measure:
    """A column. better: whether higher or lower figures are, "" for neither; digits: significant
    digits to show."""

    name: str
    better: Literal["higher", "lower", ""] = ""
    digits: int = 4

    def shown(self, value: float | None) -> str:
        """The value as it stands in tables."""
        if value is None:
            return ""
        return f"{value:.0f}" if abs(value) >= 10**self.digits else f"{value:.{self.digits}g}"


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    label: how it is called. budget: the share of tokens or keys that is left, None where the
        options say how many. kept: how many these are. figures: by the names of the measures.
    line: what puts it into the model, to copy. reason: why there are no figures.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    budget: float | None = None
    kept: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    line: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """What tokred.evaluate, tokred.benchmark and tokred.profile return.

    title: what was measured on which model. measures: the columns. dense: the model without any
    method. rows: the methods. notes: what a reader has to know. interrupted: by Ctrl-C, so that the
    rows that were not reached have it as their reason.
    """

    title: str
    measures: tuple[Measure, ...]
    dense: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    origin: Origin = field(default_factory=lambda: origin(True))

    def table(self) -> str:
        """Text: the figures of every row, then the lines to copy, then why others have none."""
        shown = self._shown()
        headings = ["", "kept", *(measure.name for measure in shown)]
        lines = [self.title, "", *_aligned([headings, *map(self._cells, self._measured())]), ""]
        if copied := [row for row in self.rows if row.figures and row.line]:
            width = max(len(row.label) for row in copied)
            lines += ["to copy:", *(f"  {row.label:{width}s}  {row.line}" for row in copied), ""]
        if without := [row for row in self.rows if row.reason]:
            lines += ["not measured:", *(f"  {row.label}: {row.reason}" for row in without), ""]
        lines += self.notes
        if self.interrupted:
            lines.append("interrupted: what was measured until then is above")
        return "\n".join(lines).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, text and numbers; numbers that are not finite become None."""
        whole = _plain(asdict(self))
        assert isinstance(whole, dict)
        return whole

    def to_json(self, path: str | Path) -> Path:
        """Writes it as JSON; returns the path."""
        return _write(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def plot(self, path: str | Path) -> Path:
        """Writes a picture in the format of the path's suffix, such as .png: a panel for each
        measure, a point for each method, a line for the dense model; returns the path.

        Raises:
            ImportError: matplotlib is not installed.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._figure().savefig(path, dpi=150)
        return Path(path)

    def to_html(self, path: str | Path) -> Path:
        """Writes one page that needs no other file, with the plot where matplotlib is installed;
        returns the path."""
        from .html import page

        return _write(path, page(self))

    def _measured(self) -> list[Row]:
        return [self.dense, *(row for row in self.rows if row.figures)]

    def _shown(self) -> list[Measure]:
        """The measures of which there is a figure."""
        rows = self._measured()
        return [m for m in self.measures if any(m.name in row.figures for row in rows)]

    def _cells(self, row: Row) -> list[str]:
        kept = "all" if row is self.dense else "" if row.kept is None else str(row.kept)
        return [row.label, kept, *(m.shown(row.figures.get(m.name)) for m in self._shown())]

    def _figure(self) -> Any:
        from .figure import new_figure

        measures = [measure for measure in self._shown() if measure.better][:4]
        measures = measures or self._shown()[:4]
        rows = self._measured()[:0:-1]
        figure, panels = new_figure(
            2.2 + 2.6 * len(measures), len(measures), 1.6 + 0.24 * len(rows)
        )
        for number, measure in enumerate(measures):
            axes = panels[number]
            for place, row in enumerate(rows):
                value = row.figures.get(measure.name)
                if value is not None and math.isfinite(value):
                    axes.plot([value], [place], "o", color="C0")
            if (at := self.dense.figures.get(measure.name)) is not None and math.isfinite(at):
                axes.axvline(at, color="black", linewidth=0.8)
            axes.set_ylim(-0.6, max(len(rows), 1) - 0.4)
            axes.set_yticks(range(len(rows)), [row.label if number == 0 else "" for row in rows])
            better = {"higher": ", more is better", "lower": ", less is better", "": ""}
            axes.set_xlabel(measure.name + better[measure.better], fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{self.title}\n(black line: {self.dense.label})", fontsize=9)
        return figure


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns below one another: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{width}s}" if place == 0 else f"{cell:>{width}s}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _plain(value: Any) -> Any:
    """A value that JSON can hold; other types as their repr."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else repr(value)


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
