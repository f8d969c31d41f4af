"""A call that launches the kernel of forest_roots."""

from __future__ import annotations

import torch
from launches import Call, whole

import tokred


def _roots(device: str) -> torch.Tensor:
    """Every token's parent stands before it, and some have none."""
    position = torch.arange(1100, dtype=torch.int32, device=device)
    parent = position - 1 - whole(90, (2, 1100), device)
    return tokred.forest_roots(parent)[0]


CALLS = (Call("forest_roots", ("forest_roots_kernel",), _roots),)
