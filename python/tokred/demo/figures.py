"""Pictures of which patches of an image were merged or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

# A title and an image uint8 [H, W, 3].
Panel: TypeAlias = tuple[str, np.ndarray]

# Borders are a darker shade of the region, or a lighter one where it is nearly black.
_BORDER_SHADE = 0.62
_BORDER_LIGHT = 44.0
DROPPED_SHADE = 0.15  # of a dropped patch's grey value


def merged_regions(image: np.ndarray, groups: np.ndarray, side: int = 518) -> np.ndarray:
    """The image with every merged region in its mean colour and a thin border around it.

    Args:
        image: uint8 [S, S, 3], the square the model saw.
        groups: int [G, G], the group of each patch; patches of one group need not touch. Those
            below 0 were dropped: they are drawn nearly black, each by itself.
        side: the picture's height and width in pixels, rounded to a multiple of G.

    Returns:
        uint8 [side, side, 3].
    """
    grid = groups.shape[0]
    cell = max(round(side / grid), 4)
    dropped = groups < 0
    groups = np.where(dropped, -1 - np.arange(groups.size).reshape(groups.shape), groups)
    labels = np.unique(groups, return_inverse=True)[1].reshape(groups.shape)
    colours = patch_colours(image, grid).reshape(-1, 3)
    count = np.bincount(labels.ravel())
    means = [np.bincount(labels.ravel(), colours[:, c]) / count for c in range(3)]
    shown = np.stack(means, -1)[labels]
    shown[dropped] = shown[dropped].mean(-1, keepdims=True) * DROPPED_SHADE
    picture = shown.repeat(cell, 0).repeat(cell, 1)
    border = _borders(labels, cell)
    colour = picture[border]
    dark = colour.mean(-1, keepdims=True) < _BORDER_LIGHT
    picture[border] = np.where(dark, colour + _BORDER_LIGHT, colour * _BORDER_SHADE)
    return picture.round().clip(0, 255).astype(np.uint8)


def save_panels(path: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Writes a PNG with the panels side by side, one row of them below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.6 * columns, 2.9 * len(rows) + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, panels in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (caption, image) in zip(line, panels, strict=False):
            axis.imshow(image, interpolation="antialiased")
            axis.set_title(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def patch_colours(image: np.ndarray, grid: int) -> np.ndarray:
    """float [G, G, 3]: the mean colour of each cell of the grid."""
    size = image.shape[0] // grid
    square = image[: size * grid, : size * grid].astype(np.float64)
    return square.reshape(grid, size, grid, size, 3).mean((1, 3))


def _borders(labels: np.ndarray, cell: int) -> np.ndarray:
    """bool [G cell, G cell]: the first pixels of a region after another one, across and down."""
    pixels = labels.repeat(cell, 0).repeat(cell, 1)
    border = np.zeros(pixels.shape, dtype=bool)
    border[:, 1:] |= pixels[:, 1:] != pixels[:, :-1]
    border[1:] |= pixels[1:] != pixels[:-1]
    return border
