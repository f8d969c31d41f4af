"""python -m tokred gallery: what each method joins or drops in one photograph, or keeps of a video.

Every method gets the same budget: the same share of the tokens is left behind the last layer of
DINOv2 ViT-S/14. Merging methods give up some in all layers, dropping ones where they were published
to. One PNG has the methods side by side, each with its time beside the unpatched model's and the
cosine of its features to that model's; --html writes a page with a slider over several budgets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokred._paths import check_file, check_folder
from tokred.evaluation.budgets import fitted, options_at, reducers
from tokred.evaluation.origin import origin
from tokred.methods import Method

from .dinov2 import IMAGE_SIZE, PATCH_SIZE, load_dinov2
from .figures import Panel, merged_regions, save_panels
from .images import Photograph, photograph_of, photographs_in, tokens_left, turn
from .offline import MissingModelError, require_packages

if TYPE_CHECKING:
    import numpy as np

COLUMNS = 4
MODEL = "DINOv2 ViT-S/14"
SAMPLE = "astronaut"  # of scikit-image
BUDGETS = (0.15, 0.25, 0.4, 0.5, 0.6, 0.75)  # of the page


@dataclass(frozen=True)
class Entry:
    """One method on one photograph; times are medians of turns with the unpatched model."""

    method: str
    options: dict[str, Any]
    tokens: int
    ms_unpatched: float
    ms_patched: float
    speed_up: float
    cls_cosine: float
    patch_cosine: float

    def caption(self) -> str:
        return (
            f"{self.method}: {self.tokens} tokens, {self.ms_patched:.0f} ms\n"
            f"{self.speed_up:.2f}×, CLS {self.cls_cosine:.4f}, patches {self.patch_cosine:.4f}"
        )


def draw_image(
    photograph: Photograph, chosen: Sequence[Method], keep: float, repeats: int, output: Path
) -> list[Entry]:
    """Runs every method on the photograph; writes NAME_gallery.png and .json into the folder."""
    model = load_dinov2()
    grid = _grid(photograph)
    drawn = _drawn(model, photograph, chosen, keep, repeats)
    panels: list[Panel] = [(f"{grid * grid} patches", photograph.image)]
    panels += [(e.caption(), merged_regions(photograph.image, groups)) for e, groups in drawn]
    title = f"{photograph.name}: what is left of {grid * grid} patches of {MODEL}"
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    save_panels(output / f"{photograph.name}_gallery.png", title, rows)
    entries = [entry for entry, _ in drawn]
    _save_entries(output, photograph.name, {"keep": keep, "repeats": repeats}, entries)
    return entries


def draw_page(
    photograph: Photograph,
    chosen: Sequence[Method],
    keeps: Sequence[float],
    repeats: int,
    page: Path,
) -> None:
    """Runs every method at every budget on the photograph; writes the page."""
    from .page import Budget, write_page

    model = load_dinov2()
    budgets = [
        Budget(keep, _drawn(model, photograph, chosen, keep, repeats)) for keep in sorted(keeps)
    ]
    made = origin(True)
    facts = {"cpu": made.cpu, "threads": f"{made.threads} threads", "torch": f"torch {made.torch}"}
    facts |= {"tokred": f"tokred {made.tokred} {made.revision}", "date": made.date}
    write_page(page, photograph, MODEL, _grid(photograph), budgets, facts)


def _grid(photograph: Photograph) -> int:
    return photograph.image.shape[0] // PATCH_SIZE


def _drawn(
    model: nn.Module, photograph: Photograph, chosen: Sequence[Method], keep: float, repeats: int
) -> list[tuple[Entry, np.ndarray]]:
    """The entry of every method, and the group of each patch, int [G, G], -1 where dropped."""
    layers, grid = model.config.num_hidden_layers, _grid(photograph)
    drawn = []
    with torch.inference_mode():
        for method in chosen:
            options = options_at(method, layers, grid * grid, keep)
            assert options is not None
            left = partial(tokens_left, model, method.name, photograph.pixels)
            options = fitted(method, layers, options, keep * grid * grid, left)
            entry, groups = _measured(model, photograph, method.name, options, repeats)
            drawn.append((entry, groups.reshape(grid, grid).numpy()))
            print(entry.caption().replace("\n", ", "), flush=True)
    return drawn


def draw_video(name: str, photographs: list[Photograph], keep: float, output: Path) -> None:
    """Runs every method for video on the frames; writes NAME_gallery.png and .json."""
    from . import video

    with torch.inference_mode():
        frames = video.encode(load_dinov2(), photographs)
        tokens = frames.x.shape[1] * frames.x.shape[2]
        rows: list[list[Panel]] = [[(p.name, p.image) for p in photographs]]
        entries = []
        for method in video.VIDEO:
            entry, token_map = video.measure(frames, method, keep)
            entries.append(entry)
            rows.append(video.panels(frames, entry, token_map))
            print(", ".join(entry.facts(tokens)), flush=True)
    title = f"{name}: what is left of {len(photographs)} frames"
    save_panels(output / f"{name}_gallery.png", title, rows)
    _save_entries(output, name, {"keep": keep}, entries)


def _save_entries(
    output: Path, name: str, settings: dict[str, Any], entries: Sequence[Any]
) -> None:
    report = {"origin": asdict(origin(True)), **settings}
    report["entries"] = [asdict(entry) for entry in entries]
    (output / f"{name}_gallery.json").write_text(json.dumps(report, indent=2) + "\n")


def _measured(
    model: nn.Module, photograph: Photograph, name: str, options: dict[str, Any], repeats: int
) -> tuple[Entry, torch.Tensor]:
    """The entry of a method, and the group of each patch."""
    turn(model, photograph, name, options)  # warms up
    turns = [turn(model, photograph, name, options) for _ in range(repeats)]
    unpatched = statistics.median(one.unpatched for one in turns)
    patched = statistics.median(one.merged for one in turns)
    cosine, last = turns[-1].cosine, turns[-1]
    entry = Entry(
        method=name,
        options=options,
        tokens=last.tokens,
        ms_unpatched=unpatched * 1e3,
        ms_patched=patched * 1e3,
        speed_up=unpatched / patched,
        cls_cosine=cosine[0].item(),
        patch_cosine=cosine[1:].mean().item(),
    )
    return entry, last.token_map[1:]


def main(arguments: Sequence[str] = ()) -> int:
    """Draws the gallery; the exit code is 2 for what cannot be drawn, 1 where a model or a package
    is missing."""
    parser = argparse.ArgumentParser(prog="python -m tokred gallery", description=__doc__)
    parser.add_argument("--image", help=f"a photograph; by default scikit-image's {SAMPLE}")
    parser.add_argument("--video", type=Path, help="a folder of frames, in order of name")
    parser.add_argument("--frames", type=int, default=4, help="of the video, at even distances, 4")
    parser.add_argument("--output", type=Path, default=Path("gallery_output"))
    parser.add_argument("--keep", type=float, default=0.5, help="the share of tokens left, 0.5")
    parser.add_argument("--html", type=Path, help="write one page of several budgets instead")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=BUDGETS, help="shares left, of the page"
    )
    parser.add_argument("--size", type=int, default=IMAGE_SIZE, help="pixels of the square, 518")
    parser.add_argument("--repeats", type=int, default=3, help="turns that are timed, 3")
    parser.add_argument("--methods", nargs="+", default=(), help="only these")
    options = parser.parse_args(arguments)
    try:
        require_packages()
        if not 0 < options.keep <= 1:
            raise ValueError(f"--keep must be in (0, 1], got {options.keep}")
        for keep in options.budgets:
            if not 0 < keep <= 1:
                raise ValueError(f"--budgets must be in (0, 1], got {keep}")
        if options.size < PATCH_SIZE or options.size % PATCH_SIZE:
            raise ValueError(f"--size must be a multiple of {PATCH_SIZE}, got {options.size}")
        if options.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
        if options.html is not None:
            check_file("--html", options.html)
        else:
            check_folder("--output", options.output)
        if options.frames < 1:
            raise ValueError(f"--frames must be at least 1, got {options.frames}")
        if options.video is not None:
            _video(options)
        else:
            chosen = reducers(options.methods, "--methods")
            photograph = photograph_from(options.image, options.size)
            if options.html is not None:
                draw_page(photograph, chosen, options.budgets, options.repeats, options.html)
            else:
                draw_image(photograph, chosen, options.keep, options.repeats, options.output)
    except BrokenPipeError:
        raise
    except (MissingModelError, OSError, ValueError) as error:
        print(f"tokred gallery: {error}", file=sys.stderr)
        return 1 if isinstance(error, MissingModelError) else 2
    return 0


def _video(options: argparse.Namespace) -> None:
    from .video import frame_paths

    if options.image is not None or options.html is not None or options.methods:
        raise ValueError("--video takes neither --image nor --html nor --methods")
    paths = frame_paths(options.video, options.frames)
    photographs = [photograph_from(str(path), options.size) for path in paths]
    draw_video(options.video.resolve().name, photographs, options.keep, options.output)


def photograph_from(path: str | None, size: int) -> Photograph:
    """The centre square of an image file, or of scikit-image's own photograph where None."""
    if path is None:
        return next(photographs_in((SAMPLE,), size))
    from skimage.color import gray2rgb
    from skimage.io import imread
    from skimage.util import img_as_ubyte

    image = img_as_ubyte(imread(path))
    if image.ndim == 2:
        image = gray2rgb(image)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"{path} must be a grey, RGB or RGBA image, got shape {image.shape}")
    return photograph_of(Path(path).stem, image[..., :3], size)
