"""ToMe for diffusion: merge right before attention, unmerge right after it.

Token Merging for Fast Stable Diffusion (CVPR workshops 2023, arXiv 2303.17604). One token of every
cell of a grid is a destination, all others are sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

import tokred
from tokred.grid import grid_of

from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import LatentCall


def grid_destinations(
    height: int,
    width: int,
    stride_y: int = 2,
    stride_x: int = 2,
    seed: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """One token per stride_y x stride_x cell of a height x width grid, cells in row-major order.

    Args:
        height, width: of the grid. Rows and columns beyond the last whole cell hold no destination.
        seed: int64 scalar tensor, from which the token of each cell is drawn, the same for the same
            seed on every device; None takes the top left one.
        device: where the result goes, the seed's by default.

    Returns:
        i32 [1, (height // stride_y) * (width // stride_x)] positions, shared by a batch, so that
        the two halves of a guided batch merge alike.
    """
    rows, columns = height // stride_y, width // stride_x
    device = seed.device if device is None and seed is not None else device
    cells = torch.arange(rows * columns, device=device).view(rows, columns)
    choice = torch.zeros_like(cells)
    if seed is not None:
        choice = _mixed(_mixed(seed.to(cells.device)) ^ cells) % (stride_y * stride_x)
    y = torch.arange(rows, device=device)[:, None] * stride_y + choice // stride_x
    x = torch.arange(columns, device=device)[None, :] * stride_x + choice % stride_x
    return (y * width + x).reshape(1, -1).to(torch.int32)


def block_seed(x: torch.Tensor, seed: int, block: int) -> torch.Tensor:
    """A seed for grid_destinations that depends on the tokens x, the user's seed and the block.

    The tokens differ from step to step, so that the cells are drawn anew in each; and where a block
    is run a second time on the same tokens, as torch.utils.checkpoint does, it draws the same.

    Args:
        x: [B, N, C]; the first channel of every token counts.

    Returns:
        int64 scalar tensor on x's device. O(B N); nothing waits for the device.
    """
    # Sums of integers do not depend on their order, unlike sums of floats.
    content = x.detach()[..., :1].contiguous().view(torch.int16).sum(dtype=torch.int64)
    return _mixed(_mixed(content) ^ _mixed(seed) ^ (block * 0x1F123BB5))


Bits = TypeVar("Bits", int, torch.Tensor)


def _mixed(x: Bits) -> Bits:
    """int64 -> int64 in [0, 2^32): every bit of the input changes about half of the output.

    Shifts and multiplications by odd numbers, as in all integer hashes; the factors are below 2^31,
    so that no product leaves 63 bits.
    """
    x = (x ^ (x >> 32)) & 0xFFFFFFFF
    for factor in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def random2d_plan(
    metric: torch.Tensor,
    height: int,
    width: int,
    r: int,
    stride_y: int = 2,
    stride_x: int = 2,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int] | None:
    """The map that merges the r tokens most similar to one of the grid's destinations.

    Args:
        metric: [B, height * width, C].
        r: tokens to merge, clamped to the number of sources.
        stride_y, stride_x, seed: as in grid_destinations.

    Returns:
        (token_map i32 [B, N], N - r), or None where r or the number of destinations is 0.
        Merge with tokred.merge(x, token_map, num_out), undo with tokred.unmerge(y, token_map).

    Raises:
        ValueError: metric does not hold height * width tokens.
    """
    tokens = metric.shape[1]
    if tokens != height * width:
        raise ValueError(f"metric holds {tokens} tokens, not the {height} x {width} of the grid")
    destinations = grid_destinations(height, width, stride_y, stride_x, seed, metric.device)
    r = min(r, tokens - destinations.shape[1])
    if r <= 0 or destinations.shape[1] == 0:
        return None
    token_map = tokred.bipartite_soft_matching(metric.detach(), r, destinations=destinations)
    return token_map, tokens - r


def compute_merge(
    x: torch.Tensor,
    latent_size: tuple[int, int],
    options: TomesdOptions,
    seed: torch.Tensor | None = None,
    finest: int = 1,
) -> tuple[torch.Tensor, int] | None:
    """The plan for one block's input x [B, N, C], given the latent's (height, width).

    r = int(N * ratio). Blocks downsampled more than finest * options.max_downsample are left alone
    (None), finest being the downsampling of the model's finest block. Batches of odd size choose
    the top left of each cell, as guided pairs cannot be told apart in them.

    Args:
        seed: as in grid_destinations; None for the top left.
    """
    downsample, rows, columns = grid_of(x.shape[1], latent_size)
    if downsample > finest * options.max_downsample:
        return None
    return random2d_plan(
        x,
        rows,
        columns,
        int(x.shape[1] * options.ratio),
        options.stride_y,
        options.stride_x,
        seed if x.shape[0] % 2 == 0 else None,
    )


@dataclass(frozen=True)
class TomesdOptions(Options):
    """Options of tokred.patch(unet, "tomesd", ...).

    ratio is the share of tokens to merge (at most 1 - 1 / (stride_x stride_y) can be); merge_attn,
    merge_crossattn and merge_mlp say which parts of a block run on merged tokens.

    max_downsample counts from the model's finest block, the first one of a forward pass or any
    finer one before: 1 merges in the blocks that have as many tokens as that. As published where
    the finest block has a token per pixel of the latent, as in Stable Diffusion 1 and 2; where it
    has fewer (SDXL, PixArt, DiT), the published rule, which counts from the latent, merges nothing.

    With use_rand the destinations are drawn anew in every block of every step: a function of the
    seed (torch.initial_seed() where none is given), the block and its tokens.
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
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), not {self.ratio}")
        if min(self.stride_x, self.stride_y, self.max_downsample) < 1:
            raise ValueError("stride_x, stride_y and max_downsample must be at least 1")
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("one of merge_attn, merge_crossattn and merge_mlp must be True")

    def layers(self, num_layers: int) -> range:
        """All blocks, unless the ratio is 0."""
        return range(num_layers if self.ratio else 0)

    def plan(self, call: LatentCall) -> tuple[torch.Tensor, int] | None:
        """compute_merge of the block's tokens."""
        # Tokens that come straight from an image are channel-first; the ops want rows.
        x = call.x.contiguous()
        x = x.float() if x.dtype == torch.float64 else x
        seed = call.seed if self.seed is None else self.seed
        drawn = block_seed(x, seed, call.layer) if self.use_rand else None
        return compute_merge(x, call.latent_size, self, drawn, call.finest)


METHOD = Method(
    title="Token Merging for Fast Stable Diffusion",
    arxiv="2303.17604",
    family=Family.MERGE,
    needs=(Needs.IMAGE_DIFFUSION,),
    status="exact",
    summary="merge into one token per grid cell before attention, copy back after it",
    options=TomesdOptions,
)
