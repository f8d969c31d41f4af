"""The gallery as one self-contained HTML page: a slider over budgets, a checkbox a method."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import DROPPED_SHADE, patch_colours
from .images import Photograph

if TYPE_CHECKING:
    from .gallery import Entry

DROPPED = 65535  # as a group in the page, whose numbers have 16 bits


@dataclass(frozen=True)
class Budget:
    """All methods at one share of the tokens: each with the group of every patch, int [G, G]."""

    keep: float
    drawn: Sequence[tuple[Entry, np.ndarray]]


def write_page(
    path: Path,
    photograph: Photograph,
    model: str,
    grid: int,
    budgets: Sequence[Budget],
    origin: dict[str, str],
) -> None:
    """Writes the page.

    Args:
        model: whose patches they are. grid: G; the photograph has G x G patches, below 65535.
        budgets: at least one, in the order of the slider, all of the same methods.
        origin: what the page says below, of where it was measured.

    Raises:
        ValueError: too many patches.
    """
    if grid * grid >= DROPPED:
        raise ValueError(f"the page has at most 255 x 255 patches, got {grid} x {grid}")
    colours = patch_colours(photograph.image, grid).round().astype(np.uint8)
    data = {
        "name": photograph.name,
        "model": model,
        "grid": grid,
        "colours": _base64(colours),
        "dropped_shade": DROPPED_SHADE,
        "origin": origin,
        "budgets": [
            {"keep": budget.keep, "entries": [_entry(*drawn) for drawn in budget.drawn]}
            for budget in budgets
        ],
    }
    # No "<" of a name may end the script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = files("tokred.demo").joinpath("page.html").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.replace(">DATA<", f">{text}<"), encoding="utf-8")


def _entry(entry: Entry, groups: np.ndarray) -> dict[str, Any]:
    return {
        **asdict(entry),
        "groups": _base64(np.where(groups < 0, DROPPED, groups).astype("<u2")),
    }


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
