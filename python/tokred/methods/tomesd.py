"""ToMe for diffusion: merge right before attention, unmerge right after it.

Token Merging for Fast Stable Diffusion (CVPR workshops 2023, arXiv 2303.17604). One token of every
cell of a grid is a destination, all others are sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import tokred


def grid_destinations(
    height: int,
    width: int,
    stride_y: int = 2,
    stride_x: int = 2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """One token per stride_y x stride_x cell of a height x width grid, cells in row-major order.

    With a generator the token is drawn at random inside its cell, otherwise it is the top left
    one. Rows and columns beyond the last whole cell hold no destination.

    Returns:
        i32 [1, (height // stride_y) * (width // stride_x)] positions, shared by a batch, so that
        the two halves of a guided batch merge alike.
    """
    rows, columns = height // stride_y, width // stride_x
    if generator is None:
        choice = torch.zeros(rows, columns, dtype=torch.int64, device=device)
    else:
        shape = (rows, columns)
        cell = stride_y * stride_x
        choice = torch.randint(cell, shape, generator=generator, device=generator.device)
        choice = choice.to(device)
    y = torch.arange(rows, device=device)[:, None] * stride_y + choice // stride_x
    x = torch.arange(columns, device=device)[None, :] * stride_x + choice % stride_x
    return (y * width + x).reshape(1, -1).to(torch.int32)


def random2d_plan(
    metric: torch.Tensor,
    height: int,
    width: int,
    r: int,
    stride_y: int = 2,
    stride_x: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, int] | None:
    """The map that merges the r tokens most similar to one of the grid's destinations.

    Args:
        metric: [B, height * width, C].
        r: tokens to merge, clamped to the number of sources.
        stride_y, stride_x, generator: as in grid_destinations.

    Returns:
        (token_map i32 [B, N], N - r), or None where r or the number of destinations is 0.
        Merge with tokred.merge(x, token_map, num_out), undo with tokred.unmerge(y, token_map).

    Raises:
        ValueError: metric does not hold height * width tokens.
    """
    tokens = metric.shape[1]
    if tokens != height * width:
        raise ValueError(f"metric holds {tokens} tokens, not the {height} x {width} of the grid")
    destinations = grid_destinations(height, width, stride_y, stride_x, generator, metric.device)
    r = min(r, tokens - destinations.shape[1])
    if r <= 0 or destinations.shape[1] == 0:
        return None
    token_map = tokred.bipartite_soft_matching(metric.detach(), r, destinations=destinations)
    return token_map, tokens - r


def compute_merge(
    x: torch.Tensor,
    latent_size: tuple[int, int],
    options: ToMeSD,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, int] | None:
    """The plan for one block's input x [B, N, C], given the latent's (height, width).

    N is the latent's resolution divided by some factor in both directions; blocks downsampled
    more than options.max_downsample are left alone (None). r = int(N * ratio). Batches of odd
    size choose the top left of each cell, as guided pairs cannot be told apart in them.
    """
    height, width = latent_size
    downsample = math.ceil(math.sqrt(height * width // x.shape[1]))
    if downsample > options.max_downsample:
        return None
    random = options.use_rand and x.shape[0] % 2 == 0
    return random2d_plan(
        x,
        math.ceil(height / downsample),
        math.ceil(width / downsample),
        int(x.shape[1] * options.ratio),
        options.stride_y,
        options.stride_x,
        generator if random else None,
    )


@dataclass(frozen=True)
class ToMeSD:
    """Options of tokred.patch(unet, "tomesd", ...).

    ratio is the share of tokens to merge (at most 1 - 1 / (stride_x stride_y) can be); merge_attn,
    merge_crossattn and merge_mlp say which parts of a block run on merged tokens; with use_rand
    the destinations are drawn anew in every block of every step, from seed where one is given.
    """

    ratio: float = 0.5
    max_downsample: int = 1
    stride_x: int = 2
    stride_y: int = 2
    use_rand: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    seed: int | None = None

    adapters = ("diffusers",)

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), not {self.ratio}")
        if min(self.stride_x, self.stride_y, self.max_downsample) < 1:
            raise ValueError("stride_x, stride_y and max_downsample must be at least 1")


OPTIONS = ToMeSD
