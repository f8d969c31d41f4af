"""Calls of linear_attention and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sizes import Sizes, random


def _inputs(s: Sizes) -> tuple[Tensor, ...]:
    q, k = random(s.b, s.hq, s.n, s.d), random(s.b, s.hk, s.n, s.d)
    return q, k, random(s.b, s.hk, s.n, s.dv), random(s.hk).abs()


def _rest(s: Sizes) -> tuple:
    return random(s.b, s.hk, s.d, s.dv), 0.5, torch.ones(s.b, s.n, dtype=torch.bool)


CALLS = {
    "linear_attention": lambda s: (*_inputs(s), *_rest(s)),
    "linear_attention_backward": lambda s: (
        random(s.b, s.hq, s.n, s.dv), random(s.b, s.hk, s.d, s.dv), *_inputs(s), *_rest(s),
    ),
}  # fmt: skip
