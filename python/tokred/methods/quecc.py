"""QueCC: few visual tokens, each attending to its own part of the image, asked by the question.

Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters (arXiv 2411.03312).

The weights are learned and are arguments; so are queries, keys and values as their projections give
them. The embedding of the question is added to the tokens before the projection of the queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

import tokred

from ._grids import as_image
from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class QueccWeights:
    """The learned weights between the projections and the language model.

    conv: [C, 1, kernel, kernel] and conv_bias [C] or None, a convolution of each channel alone.
    into: [3 C, C] and into_bias [3 C] or None, to queries, keys and values of the attention.
    out: [C, C] and out_bias [C] or None, behind it. heads must divide C.
    """

    conv: Tensor
    into: Tensor
    out: Tensor
    conv_bias: Tensor | None = None
    into_bias: Tensor | None = None
    out_bias: Tensor | None = None
    heads: int = 8


def downsample(q: Tensor, grid: tuple[int, int], weights: QueccWeights, stride: int) -> Tensor:
    """The queries of the regions: [B, h, w, C] of q [B, H * W, C]."""
    image = as_image(q, grid)
    small = functional.conv2d(image, weights.conv, weights.conv_bias, stride, groups=image.shape[1])
    return small.permute(0, 2, 3, 1)


def regions(x: Tensor, grid: tuple[int, int], parts: tuple[int, int]) -> Tensor:
    """[B * h * w, tokens of a region, C]: the grid's tokens [B, H * W, C], cut into h x w parts.

    Raises:
        ValueError: parts that do not divide the grid.
    """
    if grid[0] % parts[0] or grid[1] % parts[1]:
        raise ValueError(
            f"grid must be divided by the {parts[0]} x {parts[1]} regions of the convolution, got "
            f"{grid[0]} x {grid[1]}"
        )
    height, width = grid[0] // parts[0], grid[1] // parts[1]
    cut = as_image(x, grid).unflatten(3, (parts[1], width)).unflatten(2, (parts[0], height))
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(-1, height * width, x.shape[2])


def local_pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: QueccWeights,
    grid: tuple[int, int],
    stride: int | None = None,
) -> Tensor:
    """One token for every region: its downsampled query attends to the region's tokens.

    Args:
        q, k, v: [B, H * W, C], what the learned projections give; grid: (H, W).
        stride: of the convolution; its kernel size where None, so that regions are disjoint. A
            kernel of the grid's size leaves one token.

    Returns:
        [B, h * w, C]; differentiable.

    Raises:
        ValueError: sizes that do not fit.

    O(B N C^2) time for the projections inside the attention.
    """
    check_minimum(1, heads=weights.heads)
    channels, kernel = q.shape[-1], weights.conv.shape[-1]
    if channels % weights.heads:
        raise ValueError(f"heads must divide the {channels} channels, got {weights.heads}")
    if kernel > min(grid):
        raise ValueError(f"conv must be no larger than the grid {grid}, got a kernel of {kernel}")
    small = downsample(q, grid, weights, kernel if stride is None else stride)
    batch, rows, columns, _ = small.shape
    into_bias = (None,) * 3 if weights.into_bias is None else weights.into_bias.chunk(3)
    projected = (
        functional.linear(x, weight, bias)
        for x, weight, bias in zip(
            (
                small.reshape(-1, 1, channels),
                regions(k, grid, (rows, columns)),
                regions(v, grid, (rows, columns)),
            ),
            weights.into.chunk(3),
            into_bias,
            strict=True,
        )
    )
    heads = [x.unflatten(2, (weights.heads, -1)).transpose(1, 2).contiguous() for x in projected]
    pooled, _ = tokred.biased_attention(*heads)
    pooled = functional.linear(pooled.transpose(1, 2).flatten(2), weights.out, weights.out_bias)
    return pooled.reshape(batch, rows * columns, channels)


METHOD = Method(
    title="Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters",
    arxiv="2411.03312",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="each region of the image becomes one token, asked by the question",
)
