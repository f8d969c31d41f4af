"""The sizes from which the calls of all ops are made, and numbers to fill them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT = torch.int32


@dataclass(frozen=True)
class Sizes:
    """Batch, heads of queries and keys, queries, keys, head sizes, slots, channels, list length."""

    b: int = 2
    hq: int = 4
    hk: int = 2
    q: int = 3
    n: int = 8
    d: int = 16
    dv: int = 16
    m: int = 4
    c: int = 8
    k: int = 2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def whole(high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, max(high, 1), shape, generator=generator, dtype=INT)
