"""python -m tokred compare: every method that fits, at equal budgets, beside the dense model.

With photographs: DINOv2 ViT-S/14 on fewer tokens. With text: SmolLM2-135M decoding from fewer keys,
and MiniLM embedding passages on fewer tokens.
A table, a plot with the Pareto front of quality and time, and JSON: what each method keeps of the
dense model's quality, its time beside the best dense practice, and the memory that it allocates.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokred._paths import check_folder
from tokred.evaluation.budgets import named, selectors
from tokred.evaluation.figure import new_figure
from tokred.evaluation.origin import origin

from .offline import MissingModelError, require_packages
from .report import mark_dense, new_table

KEEP = (0.25, 0.5, 0.75)
TEXT_MODELS = ("smollm2", "minilm")


@dataclass(frozen=True)
class Entry:
    """One method at one budget.

    budget: the share of tokens or keys. kept: how many that are, as counted in the model.
    quality: by name, the first what the front is by; better_when: "higher" or "lower".
    milliseconds, dense_milliseconds: medians of turns with the dense model.
    megabytes, dense_megabytes: the most that is allocated at once, beside weights and input.
    """

    method: str
    options: dict[str, Any]
    budget: float
    kept: int
    quality: dict[str, float]
    milliseconds: float
    dense_milliseconds: float
    megabytes: float
    dense_megabytes: float
    on_front: bool = False

    @property
    def speed_up(self) -> float:
        return self.dense_milliseconds / self.milliseconds


@dataclass(frozen=True)
class Comparison:
    """What one run has measured.

    quality: names of the measures in the order of every entry's; lower_is_better: the first one's.
    dense: the measures of the dense model, and what that is.
    """

    name: str
    model: str
    practice: str
    of: str
    quality: tuple[str, ...]
    lower_is_better: bool
    dense: dict[str, float]
    entries: list[Entry]


def with_front(entries: Sequence[Entry], measure: str, lower_is_better: bool) -> list[Entry]:
    """The entries, those on the Pareto front marked: no other is as fast and as good, and better
    in one of the two."""
    sign = -1 if lower_is_better else 1
    points = [(entry.milliseconds, -sign * entry.quality[measure]) for entry in entries]

    def beaten(point: tuple[float, float]) -> bool:
        return any(
            other != point and other[0] <= point[0] and other[1] <= point[1] for other in points
        )

    return [
        Entry(**{**asdict(entry), "on_front": not beaten(point)})
        for entry, point in zip(entries, points, strict=True)
    ]


def publish(comparison: Comparison, output: Path, complete: bool) -> None:
    """Prints the table; writes NAME_compare.json and .png."""
    from rich.console import Console

    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{comparison.name}_compare"
    report = {"origin": asdict(origin(complete)), **asdict(comparison)}
    for row, entry in zip(report["entries"], comparison.entries, strict=True):
        row["speed_up"] = entry.speed_up
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    save_plot(comparison, path.with_suffix(".png"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(comparison))
    console.print("written:", f"{path}.png, {path}.json")


def table(comparison: Comparison) -> Any:
    """One row a method and budget, the best first within a budget; * on the front."""
    headings = ("method", comparison.of, *comparison.quality, "ms", "speed-up", "MB")
    made = new_table(f"{comparison.model} beside {comparison.practice} (* Pareto front)", headings)
    dense = comparison.entries[0]
    made.add_row(
        "dense",
        "all",
        *(f"{value:.4g}" for value in comparison.dense.values()),
        f"{dense.dense_milliseconds:.1f}",
        "1",
        f"{dense.dense_megabytes:.1f}",
    )
    sign = 1 if comparison.lower_is_better else -1
    first = comparison.quality[0]
    ranked = sorted(comparison.entries, key=lambda e: (-e.budget, sign * e.quality[first]))
    for above, entry in zip([None, *ranked], ranked, strict=False):
        if above is None or above.budget != entry.budget:
            made.add_section()
        made.add_row(
            f"{'* ' if entry.on_front else ''}{entry.method}",
            str(entry.kept),
            *(f"{entry.quality[name]:.4g}" for name in comparison.quality),
            f"{entry.milliseconds:.1f}",
            f"{entry.speed_up:.2f}×",
            f"{entry.megabytes:.1f}",
        )
    return made


def save_plot(comparison: Comparison, path: Path) -> None:
    """The first measure over time with the front, and over memory."""
    figure, panels = new_figure(11, 2)
    first = comparison.quality[0]
    dense = comparison.entries[0]
    entries = sorted(comparison.entries, key=lambda entry: entry.budget)
    names = list(dict.fromkeys(entry.method for entry in comparison.entries))
    for axes, x, at, label in (
        (panels[0], "milliseconds", dense.dense_milliseconds, "ms"),
        (panels[1], "megabytes", dense.dense_megabytes, "MB allocated at once"),
    ):
        for number, name in enumerate(names):
            rows = [entry for entry in entries if entry.method == name]
            axes.plot(
                [getattr(row, x) for row in rows],
                [row.quality[first] for row in rows],
                "ov^sDPX*"[number // 10 % 8] + "-",
                color=f"C{number % 10}",
                linewidth=0.8,
                markersize=5,
                label=name,
            )
        axes.plot([at], [comparison.dense[first]], "k*", markersize=12, label="dense")
        mark_dense(axes, comparison.dense[first], "as good as dense")
        axes.set_xlabel(label)
        axes.set_ylabel(first)
    front = sorted((e.milliseconds, e.quality[first]) for e in entries if e.on_front)
    panels[0].step(
        *zip(*front, strict=True), "k--", where="post", linewidth=1, label="Pareto front"
    )
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # One legend beside both panels: there are more methods than fit into one.
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize=7)
    figure.suptitle(f"{comparison.model}, {comparison.of} kept", fontsize=10)
    figure.savefig(path, dpi=150)


def shares(text: Iterable[float]) -> tuple[float, ...]:
    """The budgets, descending and each once.

    Raises:
        ValueError: one outside (0, 1], or none.
    """
    found = tuple(sorted({*text}, reverse=True))
    if not found or not all(0 < share <= 1 for share in found):
        raise ValueError(f"--keep must be shares in (0, 1], got {list(text)}")
    return found


def _on_text(options: argparse.Namespace, budgets: tuple[float, ...]) -> Iterator[Comparison]:
    """The comparisons on text, of each model that has one of the methods asked for."""
    from . import compare_sentences, compare_text

    known = {"smollm2": selectors(), "minilm": compare_sentences.reducers()}
    methods = {method.name: method for model in options.model for method in known[model]}
    chosen = [method.name for method in named(methods, options.methods, "--methods")]
    path = Path(options.text)
    for model in options.model:
        names = [method.name for method in known[model] if method.name in chosen]
        if names and model == "smollm2":
            yield compare_text.compare(
                path, budgets, names, options.context, options.decoded, options.repeats
            )
        elif names:
            yield compare_sentences.compare(path, budgets, names, options.passages, options.repeats)


def main(arguments: Sequence[str] = ()) -> int:
    """Compares on photographs or on text; the exit code is 2 for what cannot be compared, 1 where a
    model or a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m tokred compare", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", nargs="+", metavar="FILE", help="photographs")
    what.add_argument("--text", metavar="FILE", help="text in UTF-8")
    parser.add_argument("--output", type=Path, default=Path("compare_output"), help="a folder")
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP, help="shares, .25 .5 .75")
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed, 3")
    parser.add_argument("--methods", nargs="+", default=(), help="only these")
    parser.add_argument(
        "--model", nargs="+", choices=TEXT_MODELS, default=TEXT_MODELS, help="of text, both"
    )
    parser.add_argument("--size", type=int, default=518, help="pixels of the square, 518")
    parser.add_argument("--context", type=int, default=2048, help="tokens of text in the cache")
    parser.add_argument("--decoded", type=int, default=64, help="tokens of text that are scored")
    parser.add_argument("--passages", type=int, default=16, help="of text that MiniLM embeds, 16")
    options = parser.parse_args(arguments)
    try:
        require_packages()
        if options.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
        check_folder("--output", options.output)
        budgets = shares(options.keep)
        with torch.inference_mode():
            if options.image is not None:
                from .compare_images import compare

                compared = [
                    compare(options.image, budgets, options.methods, options.size, options.repeats)
                ]
            else:
                compared = list(_on_text(options, budgets))
        for comparison in compared:
            publish(comparison, options.output, complete=not options.methods)
    except BrokenPipeError:
        raise
    except (MissingModelError, OSError, ValueError) as error:
        print(f"tokred compare: {error}", file=sys.stderr)
        return 1 if isinstance(error, MissingModelError) else 2
    return 0
