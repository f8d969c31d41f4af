"""Any number of leading dimensions as one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import check_tensor


def fold_tokens(x: Tensor, name: str) -> Tensor:
    """x [..., N, C] as [B, N, C], the same memory."""
    if x.dim() == 3:
        return x
    if x.dim() < 2:
        raise ValueError(f"{name} must be [..., N, C], got shape {list(x.shape)}")
    try:
        return x.view(math.prod(x.shape[:-2]), *x.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"the leading dimensions of {name} must fold into one without a copy, and those of "
            f"shape {list(x.shape)} with strides {x.stride()} do not: call .contiguous() where the "
            "copy is acceptable"
        ) from None


def fold_table(table: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """A small table [..., N] of that shape as [B, N]."""
    check_tensor(name, table)
    if table.dim() == 2 and len(shape) == 2:
        return table
    if table.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}, got shape {list(table.shape)}")
    return table.reshape(math.prod(shape[:-1]), shape[-1])
