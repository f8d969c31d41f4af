"""Layers that run on some tokens and leave the others as they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import tokred
from tokred.selection import scatter_back


def run_on(x: Tensor, indices: Tensor, layer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Runs a layer on the listed tokens alone; the others stay as they are.

    Args:
        x: [B, N, C]. indices: i32 [B, K]; the layer gets zeros for -1, which it must mask.
        layer: ([B, K, C], indices) -> [B, K, C]. It gathers positions, rotations and masks by the
            indices, as tokred.gather_tokens does.

    Returns:
        [B, N, C]; differentiable.
    """
    return scatter_back(x, layer(tokred.unmerge(x, indices), indices), indices)
