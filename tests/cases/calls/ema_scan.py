"""A call of ema_scan and of its gradient."""

from __future__ import annotations

from ..sizes import Sizes, random, whole


def _inputs(s: Sizes) -> tuple:
    lengths = whole(s.n + 1, s.b)
    return random(s.b, s.n, s.c), random(s.b, s.n).sigmoid(), random(s.b, s.c), lengths


CALLS = {
    "ema_scan": _inputs,
    "ema_scan_backward": lambda s: (
        random(s.b, s.n, s.c), random(s.b, s.c), *_inputs(s), random(s.b, s.n, s.c),
    ),
}  # fmt: skip
