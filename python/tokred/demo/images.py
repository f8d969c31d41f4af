"""The first part of the demo: token merging in DINOv2 ViT-S/14 on real photographs.

A table of what merging r tokens in each of the twelve layers saves and what it costs, measured in
turns with the unpatched model, and for each photograph a picture of the merged patches.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import tokred
from tokred.evaluation.measure import timed
from tokred.evaluation.origin import origin

from .dinov2 import PATCH_SIZE, load_dinov2
from .offline import MissingModelError

if TYPE_CHECKING:
    import numpy as np

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
GOOD_COSINE = 0.99


@dataclass(frozen=True)
class Plan:
    """What one run of the demo measures: r per layer by image size, and how often."""

    photographs: tuple[str, ...]
    r: dict[int, tuple[int, ...]]
    repeats: dict[int, int]


FULL = Plan(
    PHOTOGRAPHS,
    {224: (4, 8, 12, 16), 518: (20, 40, 60, 80, 100, 110)},
    {224: 5, 518: 2},
)
QUICK = Plan(PHOTOGRAPHS[:1], {224: (8, 16), 518: (100,)}, {224: 1, 518: 1})


@dataclass(frozen=True)
class Photograph:
    name: str
    image: np.ndarray  # uint8 [S, S, 3]
    pixels: Tensor  # f32 [1, 3, S, S], normalised


@dataclass(frozen=True)
class Row:
    """One r at one image size, over all photographs."""

    image_size: int
    r: int
    tokens: int
    ms_unpatched: float
    ms_merged: float
    speed_up: float
    cls_cosine: float
    cls_cosine_worst: float
    patch_cosine: float


def run(plan: Plan, output: Path) -> list[Row]:
    """Measures, prints the table, writes results.json and one PNG per photograph."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    console.print("DINOv2 ViT-S/14: merging the tokens of photographs")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows: list[Row] = []
    panels: dict[str, list[list]] = {name: [] for name in plan.photographs}
    with (
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
        torch.inference_mode(),
    ):
        steps = sum(len(amounts) for amounts in plan.r.values()) + 1
        task = progress.add_task("loading DINOv2 ViT-S/14", total=steps)
        model = load_dinov2()
        progress.advance(task)
        for size, amounts in plan.r.items():
            photographs = list(photographs_in(plan.photographs, size))
            for photograph in photographs:
                caption = f"{size} px, {_tokens(size) - 1} patches"
                panels[photograph.name].append([(caption, photograph.image)])
            for r in amounts:
                progress.update(task, description=f"{size} px, r = {r} in each layer")
                row, maps = _measure(model, photographs, r, plan.repeats[size])
                rows.append(row)
                for photograph, token_map in zip(photographs, maps, strict=True):
                    panels[photograph.name][-1].append(_panel(photograph, token_map, row))
                progress.advance(task)
    pictures = [_save(output, name, lines) for name, lines in panels.items()]
    results = output / "results.json"
    results.write_text(json.dumps(_report(rows, plan), indent=2) + "\n")
    console.print(_table(rows))
    console.print(_verdict(rows))
    console.print("written:", ", ".join(str(path) for path in (*pictures, results)))
    return rows


@dataclass(frozen=True)
class Turn:
    """Both models on one photograph, one after the other, in seconds."""

    unpatched: float
    merged: float
    tokens: int
    token_map: Tensor  # i32 [N0]
    cosine: Tensor  # f32 [N0], of each original token


def turn(
    model: torch.nn.Module, photograph: Photograph, method: str, options: dict[str, Any]
) -> Turn:
    """The model without and with a method, on one photograph."""

    def forward() -> Tensor:
        return model(photograph.pixels).last_hidden_state

    expected, unpatched = timed(forward)
    with tokred.patch(model, method, trace_source=True, **options) as handle:
        merged, patched = timed(forward)
        cosine = functional.cosine_similarity(handle.unmerge(merged), expected, dim=-1)
        return Turn(unpatched, patched, merged.shape[1], handle.token_map[0], cosine[0])


def tokens_left(
    model: torch.nn.Module, method: str, pixels: Tensor, options: dict[str, Any]
) -> int:
    """The tokens behind the last layer beside the class token."""
    with tokred.patch(model, method, **options):
        return int(model(pixels).last_hidden_state.shape[1]) - 1


def _measure(
    model: torch.nn.Module, photographs: list[Photograph], r: int, repeats: int
) -> tuple[Row, list[Tensor]]:
    """One row, and the token map of each photograph.

    Both models run in turns on one image at a time, so that whatever else the machine does slows
    both. Times are medians over photographs and repeats, after one turn to warm up.
    """
    turn(model, photographs[0], "tome", {"r": r})
    turns = [
        [turn(model, photograph, "tome", {"r": r}) for _ in range(repeats)]
        for photograph in photographs
    ]
    unpatched = statistics.median(one.unpatched for each in turns for one in each)
    merged = statistics.median(one.merged for each in turns for one in each)
    cosines = torch.stack([each[0].cosine for each in turns])
    row = Row(
        image_size=photographs[0].pixels.shape[-1],
        r=r,
        tokens=turns[0][0].tokens,
        ms_unpatched=unpatched * 1e3,
        ms_merged=merged * 1e3,
        speed_up=unpatched / merged,
        cls_cosine=cosines[:, 0].mean().item(),
        cls_cosine_worst=cosines[:, 0].min().item(),
        patch_cosine=cosines[:, 1:].mean().item(),
    )
    return row, [each[0].token_map for each in turns]


def photographs_in(names: Sequence[str], size: int) -> Iterator[Photograph]:
    """The centre square of each photograph of scikit-image, at size x size pixels."""
    from skimage import data

    for name in names:
        try:
            image = getattr(data, name)()
        except (OSError, ImportError, ValueError) as error:
            raise MissingModelError(
                f"scikit-image has no photograph {name!r} here ({error}): run "
                "`pip install --force-reinstall scikit-image`"
            ) from error
        yield photograph_of(name, image, size)


def photograph_of(name: str, image: np.ndarray, size: int) -> Photograph:
    """The centre square of an image uint8 [H, W, 3], at size x size pixels."""
    import numpy as np
    from skimage.transform import resize

    side = min(image.shape[:2])
    top, left = ((extent - side) // 2 for extent in image.shape[:2])
    square = image[top : top + side, left : left + side]
    scaled = resize(square, (size, size), anti_aliasing=True).astype(np.float32)
    pixels = (torch.from_numpy(scaled) - torch.tensor(MEAN)) / torch.tensor(STD)
    shown = (scaled * 255).round().astype(np.uint8)
    return Photograph(name, shown, pixels.permute(2, 0, 1)[None].contiguous())


def _panel(photograph: Photograph, token_map: Tensor, row: Row) -> tuple[str, np.ndarray]:
    from .figures import merged_regions

    grid = row.image_size // PATCH_SIZE
    groups = token_map[1:].reshape(grid, grid).cpu().numpy()
    caption = f"r = {row.r}: {row.tokens - 1} regions"
    return caption, merged_regions(photograph.image, groups, side=592)


def _save(output: Path, name: str, rows: list[list]) -> Path:
    from .figures import save_panels

    path = output / f"{name}.png"
    save_panels(path, f"{name}: patches merged by DINOv2 ViT-S/14 with ToMe", rows)
    return path


def _tokens(size: int) -> int:
    return (size // PATCH_SIZE) ** 2 + 1


def _table(rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    title = "DINOv2 ViT-S/14 with ToMe in its 12 layers, float32, one image at a time"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ("pixels", "r", "tokens", "SDPA ms", "tokred ms", "speed-up", "CLS cos", "patch cos")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = rows[0]
    for row in rows:
        if row.image_size != previous.image_size:
            table.add_section()
        previous = row
        table.add_row(
            str(row.image_size),
            str(row.r),
            f"{_tokens(row.image_size)} → {row.tokens}",
            f"{row.ms_unpatched:.0f}",
            f"{row.ms_merged:.0f}",
            f"{row.speed_up:.2f}×",
            f"{row.cls_cosine:.4f}",
            f"{row.patch_cosine:.4f}",
        )
    return table


def _verdict(rows: list[Row]) -> str:
    """The fastest faithful r, and the first r that pays, by image size."""
    lines = []
    for size in sorted({row.image_size for row in rows}):
        here = [row for row in rows if row.image_size == size]
        faithful = [row for row in here if row.cls_cosine >= GOOD_COSINE]
        paying = next((row for row in here if row.speed_up > 1), None)
        even = f"r = {paying.r} is the first measured that pays" if paying else "no r pays"
        if faithful:
            best = max(faithful, key=lambda row: row.speed_up)
            top = f"{best.speed_up:.2f}× at CLS cosine {best.cls_cosine:.4f} (r = {best.r})"
        else:
            top = f"no r keeps a CLS cosine of {GOOD_COSINE}"
        lines.append(f"{size} px: {top}; {even}")
    return "\n".join(lines)


def _report(rows: list[Row], plan: Plan) -> dict[str, Any]:
    return {
        "origin": asdict(origin(plan is FULL)),
        "photographs": list(plan.photographs),
        "repeats": {str(size): count for size, count in plan.repeats.items()},
        "rows": [asdict(row) for row in rows],
    }
