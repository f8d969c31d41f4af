"""The kernels of kmeans."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "kmeans",
        (
            "kmeans_start_kernel",
            "token_scale_kernel",
            "kmeans_round_kernel",
            "nearest_kernel",
            "kmeans_move_kernel",
        ),
        lambda d: tokred.kmeans(draw((2, 300, 40), d), 12, 2, metric="cosine"),
    ),
)
