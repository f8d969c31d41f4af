"""A call of sinkhorn and of its gradient."""

import torch

from ..sizes import Sizes, random


def _tensors(s: Sizes) -> tuple:
    return (
        random(s.b, s.n, s.c), random(s.b, s.m, s.c), random(s.b, s.n, 2), random(s.b, s.m, 2),
        random(s.b, s.n), random(s.b, s.m), torch.ones(s.b, s.n, dtype=torch.bool),
        torch.ones(s.b, s.m, dtype=torch.bool), random(s.b),
    )  # fmt: skip


CALLS = {
    "sinkhorn": lambda s: (*_tensors(s), 0.5, 1.5, 0.1, 5, 0.01),
    "sinkhorn_backward": lambda s: (
        random(s.b, s.m, s.c), random(s.b, s.m), *_tensors(s),
        torch.full((s.b,), 3, dtype=torch.int32), 0.5, 1.5, 0.1, 5,
    ),
}  # fmt: skip
