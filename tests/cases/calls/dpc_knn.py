"""A call of dpc_knn."""

from __future__ import annotations

import torch

from ..sizes import random

CALLS = {
    "dpc_knn": lambda s: (
        random(s.b, s.n, s.c), s.m, s.k + 1, torch.ones(s.b, s.n, dtype=torch.bool),
    ),
}  # fmt: skip
