"""What methods on grids of tokens share: tokens as an image and back, sums and masks of cells."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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


def check_grid(tokens: int, grid: tuple[int, int]) -> None:
    """Refuses a grid (H, W) that has another number of tokens."""
    if min(grid) < 1 or grid[0] * grid[1] != tokens:
        raise ValueError(f"grid must have {tokens} tokens, got {grid[0]} x {grid[1]}")


def cell_sums(values: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """f32 [..., rows * columns]: the sums over the cells when cells (rows, columns) divide a grid.

    Cells are H // rows tokens high and W // columns wide, the last ones take what is left.

    Args:
        values: [..., H * W]. grid: (H, W).

    Raises:
        ValueError: more cells than tokens along an axis, or a grid that does not fit.
    """
    check_grid(values.shape[-1], grid)
    if min(cells) < 1 or cells[0] > grid[0] or cells[1] > grid[1]:
        raise ValueError(
            f"cells must be from 1 x 1 to the grid's {grid[0]} x {grid[1]}, got "
            f"{cells[0]} x {cells[1]}"
        )
    if grid[0] % cells[0] == grid[1] % cells[1] == 0:
        shape = cells[0], grid[0] // cells[0], cells[1], grid[1] // cells[1]
        # In float64, so that no order of addition shows.
        return values.unflatten(-1, shape).sum((-3, -1), dtype=torch.float64).flatten(-2).float()
    rows, columns = (
        (torch.arange(size, device=values.device) // (size // parts)).clamp(max=parts - 1)
        for size, parts in zip(grid, cells, strict=True)
    )
    sums = values.new_zeros(*values.shape[:-1], cells[0] * cells[1], dtype=torch.float32)
    return sums.index_add_(-1, (rows[:, None] * cells[1] + columns).flatten(), values.float())


def dilate(selected: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [..., H * W]: selected and their neighbours above, below, left and right in the grid."""
    check_grid(selected.shape[-1], grid)
    image = selected.unflatten(-1, grid)
    grown = image.clone(memory_format=torch.contiguous_format)
    for dim in (-2, -1):
        if (rest := image.shape[dim] - 1) > 0:
            grown.narrow(dim, 1, rest).logical_or_(image.narrow(dim, 0, rest))
            grown.narrow(dim, 0, rest).logical_or_(image.narrow(dim, 1, rest))
    return grown.flatten(-2)


def resize(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """f32 [..., H' * W']: a map [..., H * W] resized bilinearly, corners not aligned."""
    check_grid(values.shape[-1], grid)
    rows = values.float().reshape(-1, 1, *grid)
    out = functional.interpolate(rows, size, mode="bilinear", align_corners=False)
    return out.reshape(*values.shape[:-1], size[0] * size[1])


def content_mask(
    image: tuple[int, int], grid: tuple[int, int], threshold: float = 0.5, device: str = "cpu"
) -> Tensor:
    """bool [H * W]: the patches of a letter-boxed image that show some of it.

    The image (width, height) is scaled to fit the square or rectangle of the grid (H, W), centred,
    and padded; a patch counts where at most `threshold` of its area is padding.
    """
    width, height = image
    if min(width, height) < 1:
        raise ValueError(f"image must be (width, height) of at least 1, got {image}")
    rows, columns = grid
    scale = min(columns / width, rows / height)

    def covered(size: int, patches: int) -> Tensor:
        """How much of every patch along an axis lies in the image."""
        margin = (patches - size * scale) / 2
        place = torch.arange(patches, dtype=torch.float64, device=device)
        return ((place + 1).clamp(max=patches - margin) - place.clamp(min=margin)).clamp(min=0)

    area = covered(height, rows)[:, None] * covered(width, columns)
    return (1 - area <= threshold + 1e-9).flatten()
