"""SG-Former: keys and values in three compression rates, the finest where attention is highest.

SG-Former: Self-guided Transformer with Evolving Token Reallocation (arXiv 2308.12216).

The weights that compress are learned and are arguments; projections and attention are the model's.
Tokens of equal significance keep their order, which the authors' code leaves to the sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._grids import check_grid
from ._method import Family, Method, Needs

# (share of the tokens, tokens that become one), from the least significant tokens on, by the
# reduction of the stage.
RATES = {
    8: ((0.25, 196), (0.5, 56), (0.25, 28)),
    4: ((0.25, 49), (0.5, 14), (0.25, 7)),
    2: ((0.5, 2), (0.5, 1)),
}


def significance(
    global_qk: tuple[Tensor, Tensor],
    local_qk: tuple[Tensor, Tensor],
    grid: tuple[int, int],
    global_grid: tuple[int, int],
    window: int = 7,
    scale: float | None = None,
) -> Tensor:
    """How much attention every token receives, from all tokens and from those of its window.

    Args:
        global_qk: [B, H, N, D] and [B, H, h * w, D], queries and the keys of a coarse grid (h, w).
        local_qk: [B, H', N, D] twice, of attention in windows; grid (H, W), which they divide.

    Returns:
        f32 [B, N], the mean over heads and queries of one, in the nearest coarse cell, plus that of
        the other.

    Raises:
        ValueError: grids that do not fit.
    """
    coarse = tokred.attention_columns(*global_qk, reduce="mean", scale=scale).mean(1)
    check_grid(coarse.shape[1], global_grid)
    q, k = (_windows(x, grid, window) for x in local_qk)
    inside = tokred.attention_columns(q, k, reduce="mean", scale=scale).mean(1)
    rows, columns = grid[0] // window, grid[1] // window
    fine = inside.reshape(-1, rows, columns, window, window).transpose(2, 3)
    wide = functional.interpolate(coarse.reshape(-1, 1, *global_grid), grid, mode="nearest")
    return fine.flatten(1) + wide.flatten(1)


def _windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """[B, H, N, D] -> [B * windows, H, window * window, D]."""
    check_grid(x.shape[2], grid)
    if grid[0] % window or grid[1] % window:
        raise ValueError(f"grid must be divided by window = {window}, got {grid[0]} x {grid[1]}")
    rows, columns = grid[0] // window, grid[1] // window
    cut = x.reshape(*x.shape[:2], rows, window, columns, window, x.shape[3])
    cut = cut.permute(0, 2, 4, 1, 3, 5, 6)
    return cut.reshape(-1, x.shape[1], window * window, x.shape[3]).contiguous()


def reallocate(
    x: Tensor,
    scores: Tensor,
    weights: Sequence[tuple[Tensor, Tensor | None]],
    rates: Sequence[tuple[float, int]] = RATES[4],
) -> Tensor:
    """The sequence from which keys and values are made.

    The tokens, by ascending score, are cut into parts. In each part a fixed number of consecutive
    tokens become one, by a linear layer over their places.

    Args:
        x: [B, N, C]. scores: f32 [B, N], significance.
        weights: for each part (weight [1, f], bias [1] or None).
        rates: for each part its share of the tokens and f, see RATES.

    Returns:
        [B, sum of share * N / f, C]; differentiable in x and the weights.

    Raises:
        ValueError: parts that f does not divide, or weights of another size.
    """
    tokens = x.shape[1]
    if len(weights) != len(rates):
        raise ValueError(
            f"weights must have one for each of {len(rates)} parts, got {len(weights)}"
        )
    order = torch.nan_to_num(scores.detach().float(), nan=-torch.inf).argsort(dim=1, stable=True)
    ranked = x.gather(1, order[..., None].expand_as(x))
    parts, start = [], 0
    for (share, f), (weight, bias) in zip(rates, weights, strict=True):
        length = int(share * tokens)
        if share * tokens != length or length % f or list(weight.shape) != [1, f]:
            raise ValueError(
                f"{share} of {tokens} tokens must be a multiple of {f}, beside a weight [1, {f}], "
                f"got {share * tokens} and {list(weight.shape)}"
            )
        groups = ranked[:, start : start + length].unflatten(1, (-1, f))
        one = torch.einsum("bnfc,f->bnc", groups, weight[0].to(x.dtype))
        parts.append(one if bias is None else one + bias.to(x.dtype))
        start += length
    return torch.cat(parts, 1)


def column_major(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """x [B, H * W, ...] in order of columns, of which the second half of the heads is made."""
    check_grid(x.shape[1], grid)
    return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


METHOD = Method(
    title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
    arxiv="2308.12216",
    family=Family.MERGE,
    needs=(Needs.VISION_ENCODER, Needs.TRAINING),
    status="exact",
    summary="keys and values of three compression rates, the finest where attention is highest",
)
