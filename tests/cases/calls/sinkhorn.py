"""A call of sinkhorn."""

import torch

from ..sizes import random

CALLS = {
    "sinkhorn": lambda s: (
        random(s.b, s.n, s.c), random(s.b, s.m, s.c), random(s.b, s.n, 2), random(s.b, s.m, 2),
        random(s.b, s.n), random(s.b, s.m), torch.ones(s.b, s.n, dtype=torch.bool),
        torch.ones(s.b, s.m, dtype=torch.bool), random(s.b), 0.5, 1.5, 0.1, 5, 0.01,
    ),
}  # fmt: skip
