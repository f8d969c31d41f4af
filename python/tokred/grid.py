"""The grid that the tokens of a denoiser's block are of the latent."""

from __future__ import annotations

import math


def grid_of(tokens: int, latent_size: tuple[int, int]) -> tuple[int, int, int]:
    """(downsampling, height, width) of a block with that many tokens.

    The downsampling is ceil(sqrt(H W // tokens)), and the grid is the latent's size divided by it,
    rounded up, as convolutions with padding do, or down, as patches without it do.

    Raises:
        ValueError: neither has that many tokens.
    """
    height, width = latent_size
    downsample = math.ceil(math.sqrt(height * width // tokens))
    up = math.ceil(height / downsample), math.ceil(width / downsample)
    down = height // downsample, width // downsample
    for rows, columns in (up, down):
        if rows * columns == tokens:
            return downsample, rows, columns
    raise ValueError(
        f"a block has {tokens} tokens, which are no grid of a latent of {height} x {width}: "
        f"divided by {downsample} that has {up[0]} x {up[1]} or {down[0]} x {down[1]}. Models that "
        "add other tokens to those of the image, or lay them out otherwise, are not supported"
    )
