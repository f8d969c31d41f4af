"""Figures of matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def new_figure(width: float, panels: int, height: float = 3.6) -> tuple[Any, Sequence[Any]]:
    """A figure of so many inches, and its panels side by side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from None

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]
