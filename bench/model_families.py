"""The families of models that methods are tried on, built small, and docs/models.md from them.

    python -m bench.model_families                    # writes the page
    python -m bench.model_families decoder_families   # writes one section of it

A section is a file of its own beside this one, with SECTION; the sweeps in tests/integrations find
that each line of the page is what a family does.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

# Modules of this package with a SECTION, in the order of the page.
SECTIONS = ("encoder_families", "decoder_families")

HEAD = """\
# Models

What `tokred.patch` does with the families of models that the installed transformers and timm build
from a small configuration with random weights. "Exact" means: where the method has nothing to do,
the output is the unpatched model's; where it has, the model runs, and `restore_tokens` changes
nothing but the number of tokens; and the model is as it was afterwards, also after an exception.
Every other family is refused when the patch is made, for the reason given.

This page is written by `python -m bench.model_families`, and the sweeps in `tests/integrations/`
hold it to what they find.
"""


@dataclass(frozen=True)
class Family:
    """A family of models.

    name: as the page calls it. model: the class. build: makes one, small. run: its output, of which
    the first is compared.
    """

    name: str
    model: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    examine: the cells behind a family's name and class, as `columns` names them.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    families: tuple[Family, ...]
    examine: Callable[[Family], tuple[str, ...]]


def row(family: Family, cells: Iterable[str]) -> tuple[str, ...]:
    """The cells of a family's line."""
    return family.name, f"`{family.model}`", *cells


def written(family: Family) -> tuple[str, ...]:
    """The cells of a family's line on the page; empty where it has none."""
    start = f"| {family.name} | `{family.model}` |"
    for line in PAGE.read_text().splitlines():
        if line.startswith(start):
            return tuple(cell.strip() for cell in line.split("|")[1:-1])
    return ()


def page(renewed: Sequence[str] = SECTIONS) -> str:
    """The page; every family of the sections to renew is examined, others stay as they are."""
    before = PAGE.read_text().split("\n## ")[1:]
    parts = [HEAD]
    for name in SECTIONS:
        section: Section = importlib.import_module(f"{__package__}.{name}").SECTION
        if name not in renewed:
            kept = (each for each in before if each.startswith(f"{section.title}\n"))
            parts.append("\n## " + next(kept).rstrip("\n") + "\n")
            continue
        lines = [row(family, section.examine(family)) for family in section.families]
        exact = sum(line[2].startswith("exact") for line in lines)
        parts.append(
            f"\n## {section.title}\n\n{section.text}\n\n{exact} of {len(lines)} families are exact."
            f"\n\n{_table(('family', 'class', *section.columns), lines)}\n"
        )
    return "".join(parts)


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *lines)
    )


if __name__ == "__main__":
    from .bench_models import allow_torchvision

    allow_torchvision()
    PAGE.write_text(page(sys.argv[1:] or SECTIONS))
