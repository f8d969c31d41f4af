"""What the methods on grids of tokens share: tokens as an image, and back."""

from __future__ import annotations

from torch import Tensor


def as_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, H * W, C], row by row, as a view [B, C, H, W].

    Raises:
        ValueError: x does not hold that many tokens.
    """
    height, width = grid
    if x.dim() != 3 or min(grid) < 1 or x.shape[1] != height * width:
        raise ValueError(
            f"x must be [B, {height * width}, C], the tokens of a grid of {height} x {width} row "
            f"by row and without others, got {list(x.shape)}"
        )
    return x.transpose(1, 2).unflatten(2, (height, width))


def as_tokens(image: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return image.flatten(2).transpose(1, 2).contiguous()
