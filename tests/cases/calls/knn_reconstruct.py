"""A call of knn_reconstruct and of its gradient."""

from __future__ import annotations

from ..sizes import random

CALLS = {
    "knn_reconstruct": lambda s: (
        random(s.b, s.m, s.d), random(s.b, s.n, s.c), random(s.b, s.m, s.c), 3, 0.1, "l1",
    ),
    "knn_reconstruct_backward": lambda s: (
        random(s.b, s.n, s.d), random(s.b, s.n, s.c), random(s.b, s.m, s.c), 3, 0.1, "l1",
    ),
}  # fmt: skip
