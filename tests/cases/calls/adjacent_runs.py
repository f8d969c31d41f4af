"""A call of adjacent_runs."""

from __future__ import annotations

import torch

from ..sizes import Sizes, random


def _inputs(s: Sizes) -> tuple:
    mask = torch.ones(s.b, s.n, dtype=torch.bool)
    return random(s.b, s.n, s.c), 0.1, random(s.b, s.n, s.c), mask, 3, 1, 1


CALLS = {"adjacent_runs": _inputs}
