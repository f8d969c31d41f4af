"""Calls that launch the kernels of segment_weights and its gradient."""

from __future__ import annotations

from typing import Any

from case import namespace
from launches import Call, draw, whole

import tokred


def _weights(device: str, mode: str) -> Any:
    ids = whole(12, (2, 70), device) - 1
    weight = draw((2, 70), device) if mode in ("softmax", "gaussian") else None
    x = draw((2, 70, 24), device) if mode == "gaussian" else None
    return tokred.segment_weights(ids=ids, num_segments=10, mode=mode, weight=weight, x=x)


def _gradient(device: str, mode: str) -> Any:
    ids, grad = whole(12, (2, 70), device) - 1, draw((2, 70), device)
    gaussian = mode == "gaussian"
    weight, x = None if gaussian else grad, draw((2, 70, 24), device) if gaussian else None
    how = (ids, 10, mode, weight, x, None)
    weights = namespace().segment_weights.default(*how)
    return namespace().segment_weights_backward.default(grad, weights, *how)


CALLS = (
    *(
        Call(f"segment_weights, {mode}", (kernel, "skipped_weights_kernel"),
             lambda d, mode=mode: _weights(d, mode))
        for mode, kernel in (
            ("sqrt", "segment_weights_kernel"), ("last", "segment_weights_kernel"),
            ("softmax", "segment_weights_kernel"), ("gaussian", "gaussian_weights_kernel"),
        )
    ),
    Call("segment_weights_backward, softmax",
         ("softmax_weights_backward_kernel", "skipped_weights_kernel"),
         lambda d: _gradient(d, "softmax")),
    Call("segment_weights_backward, gaussian",
         ("gaussian_weights_backward_kernel", "skipped_rows_kernel"),
         lambda d: _gradient(d, "gaussian")),
)  # fmt: skip
