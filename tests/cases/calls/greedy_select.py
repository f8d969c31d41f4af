"""A call of greedy_select."""

from __future__ import annotations

import torch

from ..sizes import random, whole

CALLS = {
    "greedy_select": lambda s: (
        random(s.b, s.n, s.c), s.k, "kcenter", random(s.b, s.n).abs(), whole(s.n, s.b),
        torch.ones(s.b, s.n, dtype=torch.bool), "cosine", "isolated", 0.5,
    ),
}  # fmt: skip
