"""A call that launches kernels, and tensors for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """`run(device)` launches these kernels, and perhaps others."""

    name: str
    kernels: tuple[str, ...]
    run: Callable[[str], Any]
    wgmma: bool = False


def draw(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def whole(high: int, shape: tuple[int, ...], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(high)
    return torch.randint(0, high, shape, generator=generator).to(device, torch.int32)
