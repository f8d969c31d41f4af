"""A call of connected_components."""

from __future__ import annotations

import torch

from ..sizes import random

CALLS = {
    "connected_components": lambda s: (
        random(s.b, s.q, s.n, s.c), 3.0, "l2", torch.ones(s.b, s.q * s.n, dtype=torch.bool),
    ),
}  # fmt: skip
