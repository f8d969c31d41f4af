"""A call of local_soft_kmeans."""

from __future__ import annotations

from ..sizes import random

CALLS = {
    "local_soft_kmeans": lambda s: (
        random(s.b, s.n * s.q, s.c), [s.n, s.q], [min(s.m, s.n), min(s.k, s.q)], 2, 0.1, 3,
    ),
}  # fmt: skip
