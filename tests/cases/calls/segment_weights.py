"""A call of segment_weights and of its gradient."""

from __future__ import annotations

from ..sizes import Sizes, random, whole


def _inputs(s: Sizes) -> tuple:
    x = random(s.b, s.n, s.c)
    return whole(s.m, s.b, s.n), s.m, "gaussian", random(s.b, s.n), x, None


CALLS = {
    "segment_weights": _inputs,
    "segment_weights_backward": lambda s: (
        random(s.b, s.n), random(s.b, s.n).softmax(-1), *_inputs(s),
    ),
}  # fmt: skip
