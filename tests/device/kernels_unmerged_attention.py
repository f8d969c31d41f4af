"""A call of every kernel of unmerged_attention."""

from __future__ import annotations

from typing import Any

from launches import Call, draw, whole

import tokred

_KERNELS = ("list_queries_kernel", "unmerged_attention_kernel", "mean_of_queries_kernel")


def _call(device: str, dim: int) -> Any:
    rows = [draw((2, heads, 20, dim), device) for heads in (4, 2, 2)]
    angles = draw((1, 70, dim // 2), device)
    return tokred.unmerged_attention(*rows, whole(20, (2, 70), device), angles.cos(), angles.sin())


CALLS = (
    Call("unmerged", _KERNELS, lambda device: _call(device, 64)),
    Call("unmerged, large heads", _KERNELS, lambda device: _call(device, 192)),
)
