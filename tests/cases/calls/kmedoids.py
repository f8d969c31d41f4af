"""A call of kmedoids."""

from __future__ import annotations

import torch

from ..sizes import random, whole

CALLS = {
    "kmedoids": lambda s: (
        random(s.b, s.n, s.c), s.m, 3, whole(s.n, s.b, s.m), torch.ones(s.b, s.n, dtype=torch.bool),
        "l2",
    ),
}  # fmt: skip
