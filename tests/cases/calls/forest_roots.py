"""A call of forest_roots."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sizes import INT, Sizes


def _parents(s: Sizes) -> tuple[Tensor]:
    """Every token hangs below the middle of those before it."""
    return (((torch.arange(s.n, dtype=INT) + 1) // 2 - 1).expand(s.b, s.n).contiguous(),)


CALLS = {"forest_roots": _parents}
