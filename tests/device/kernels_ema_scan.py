"""Calls that launch the kernels of ema_scan and its gradient."""

from __future__ import annotations

from typing import Any

from case import namespace
from launches import Call, draw

import tokred


def _scan(device: str) -> Any:
    return tokred.ema_scan(draw((2, 600, 40), device), draw((2, 600), device).sigmoid())


def _gradient(device: str) -> Any:
    c, p, state = (
        draw((2, 600, 40), device),
        draw((2, 600), device).sigmoid(),
        draw((2, 40), device),
    )
    z, last = tokred.ema_scan(c, p, state)
    return namespace().ema_scan_backward.default(z, last, c, p, state, None, z)


CALLS = (
    Call("ema_scan", ("ema_scan_kernel",), _scan),
    Call("ema_scan_backward", ("ema_scan_backward_kernel", "ema_scan_share_kernel"), _gradient),
)
