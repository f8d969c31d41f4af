"""What the methods for video share: their result, and frames as one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class VideoTokens:
    """What is left of the tokens [B, F, N, C] of F frames.

    tokens: [B, M, C], or [B, F', M', C] where the method says so, slots then counted through.
    token_map: i32 [B, F * N], the slot that each token went to, -1 where it is dropped.
    lengths: i32 [B], the slots that are used, the first ones; None where all are.
    size: f32 [B, M], how many tokens each slot stands for; None where the method keeps no count.
    """

    tokens: Tensor
    token_map: Tensor
    lengths: Tensor | None = None
    size: Tensor | None = None


def check_video(x: Tensor, name: str = "x") -> tuple[int, int, int, int]:
    """The shape (B, F, N, C) of a video's tokens; frames of different sizes are no tensor.

    Raises:
        ValueError: x is no tensor of four dimensions.
    """
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} must be a tensor [B, frames, N, C], all frames with as many tokens, got {got}"
        )
    batch, frames, tokens, channels = x.shape
    return batch, frames, tokens, channels


def frame_maps_in_a_row(token_map: Tensor, num_out: int, frames: int) -> Tensor:
    """The maps i32 [B * F, N] of single frames, each with num_out slots, as i32 [B, F * N]."""
    first = torch.arange(frames, dtype=torch.int32, device=token_map.device) * num_out
    maps = token_map.unflatten(0, (-1, frames))
    return torch.where(maps >= 0, maps + first[:, None], -1).flatten(1)


def padded_map(
    slots: Sequence[np.ndarray], total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(token_map i32 [B, total], lengths i32 [B]) of the slots of every video, an array of each."""
    table = np.array(slots, np.int32).reshape(len(slots), total)
    lengths = table.max(1, initial=-1) + 1
    return torch.from_numpy(table).to(device), torch.from_numpy(lengths).to(device)
