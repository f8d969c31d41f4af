"""What each method for video keeps of a handful of frames, on patches of DINOv2 ViT-S/14."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokred
from tokred.methods import aim, center_clip, flashvid, holitom, storm, ts_llava

from .figures import Panel, merged_regions
from .images import Photograph

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Frames:
    """The frames of a video as an encoder sees them.

    x: f32 [1, F, N, C], their patches. attention: f32 [1, F, N], what the class token gives to each
    patch in the last layer, the mean of the heads.
    """

    photographs: list[Photograph]
    x: Tensor
    attention: Tensor


@dataclass(frozen=True)
class VideoEntry:
    """One method on one video; cosine: of each token to what stands for it, else 0."""

    method: str
    slots: int
    dropped: float
    ms: float
    cosine: float

    def facts(self, tokens: int) -> list[str]:
        """What is written above its pictures, of that many tokens."""
        return [
            f"{self.method}, {self.ms:.0f} ms",
            f"{self.slots} of {tokens} tokens",
            f"{self.dropped:.0%} dropped",
            f"cosine {self.cosine:.3f}",
        ]


def _aim(frames: Frames, keep: float) -> Any:
    left, shares = 1.0, []
    while left > keep:  # a step merges at most half of what is left
        shares.append(min(left / 2, left - keep))
        left -= shares[-1]
    return aim.merge_frames(frames.x, tuple(shares))


def _center_clip(frames: Frames, keep: float) -> Any:
    _, count, tokens, _ = frames.x.shape
    return center_clip.cluster_segments(frames.x, 1, max(int(count * tokens * keep), 1), 0)


def _flashvid(frames: Frames, keep: float) -> Any:
    # The published surplus of a quarter is for what the language model drops later on.
    return flashvid.merge_video(frames.x, frames.attention, keep, expansion=1.0)


def _holitom(frames: Frames, keep: float) -> Any:
    return holitom.merge_video(frames.x, frames.attention, keep)


def _storm(frames: Frames, keep: float) -> Any:
    return storm.pool_frames(frames.x, round(1 / keep))


def _ts_llava(frames: Frames, keep: float) -> Any:
    _, count, tokens, _ = frames.x.shape
    return ts_llava.sample_tokens(frames.x, max(int(count * tokens * keep), 1))


VIDEO: dict[str, Callable[[Frames, float], Any]] = {
    "aim": _aim,
    "center_clip": _center_clip,
    "flashvid": _flashvid,
    "holitom": _holitom,
    "storm": _storm,
    "ts_llava": _ts_llava,
}


def encode(model: nn.Module, photographs: list[Photograph]) -> Frames:
    """The patches of every frame, and the attention that they receive."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused kernels keep no attention
    try:
        pixels = torch.cat([photograph.pixels for photograph in photographs])
        out = model(pixels, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    attention = out.attentions[-1][:, :, 0, 1:].float().mean(1)
    return Frames(photographs, out.last_hidden_state[None, :, 1:].contiguous(), attention[None])


def measure(frames: Frames, name: str, keep: float) -> tuple[VideoEntry, Tensor]:
    """The entry of a method, and its token map i32 [F, N]."""
    VIDEO[name](frames, keep)  # warms up
    start = time.perf_counter()
    done = VIDEO[name](frames, keep)
    seconds = time.perf_counter() - start
    rows, token_map = frames.x.flatten(1, 2), done.token_map
    flat = done.tokens.reshape(1, -1, rows.shape[2])
    cosine = functional.cosine_similarity(tokred.unmerge(flat, token_map), rows, dim=-1)
    entry = VideoEntry(
        method=name,
        slots=len(token_map[token_map >= 0].unique()),
        dropped=(token_map < 0).float().mean().item(),
        ms=seconds * 1e3,
        cosine=cosine.mean().item(),
    )
    return entry, token_map.view(frames.x.shape[1:3])


def panels(frames: Frames, entry: VideoEntry, token_map: Tensor) -> list[Panel]:
    """One picture a frame: joined patches in their mean colour, dropped ones nearly black."""
    count, tokens = token_map.shape
    grid, facts = round(tokens**0.5), entry.facts(count * tokens)
    each = -(-len(facts) // count)
    row: list[Panel] = []
    for photograph, slots in zip(frames.photographs, token_map.numpy(), strict=True):
        caption = "\n".join(facts[len(row) * each : (len(row) + 1) * each])
        picture = merged_regions(photograph.image, slots.astype(np.int64).reshape(grid, grid))
        row.append((caption, picture))
    return row


def frame_paths(folder: Path, most: int) -> list[Path]:
    """The images of a folder by name, at most so many of them, at even distances.

    Raises:
        ValueError: there is no image in the folder.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"--video must be a folder of images ({' '.join(SUFFIXES)}), got {folder}")
    chosen = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
    return [found[i] for i in chosen]
