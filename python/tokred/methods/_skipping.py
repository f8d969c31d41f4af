"""Layers that run on some tokens and leave the others as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import tokred


def scatter_back(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    """x with y in the places that are listed.

    Args:
        x: [B, N, C]. y: [B, K, C]. indices: i32 [B, K], each at most once; -1 takes nothing.

    Returns:
        [B, N, C]; differentiable in x and y.
    """
    batch, tokens, channels = x.shape
    inside = (indices >= 0) & (indices < tokens)
    place = torch.where(inside, indices, tokens).long()[..., None].expand(-1, -1, channels)
    spare = torch.cat([x, x.new_zeros(batch, 1, channels)], 1)
    return spare.scatter(1, place, y.to(x.dtype))[:, :-1]


def run_on(x: Tensor, indices: Tensor, layer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a layer gives that sees the listed tokens alone; the others pass it by.

    Args:
        x: [B, N, C]. indices: i32 [B, K]; the layer gets zeros for -1, which it must mask.
        layer: ([B, K, C], indices) -> [B, K, C]. It gathers positions, rotations and masks by the
            indices, as tokred.gather_tokens does.

    Returns:
        [B, N, C]; differentiable.
    """
    return scatter_back(x, layer(tokred.unmerge(x, indices), indices), indices)
