"""A call of kmeans."""

from __future__ import annotations

import torch

from ..sizes import random, whole

CALLS = {
    "kmeans": lambda s: (
        random(s.b, s.n, s.c), s.m, 2, whole(s.n, s.b, s.m), torch.ones(s.b, s.n, dtype=torch.bool),
        "l2", 0.0,
    ),
}  # fmt: skip
