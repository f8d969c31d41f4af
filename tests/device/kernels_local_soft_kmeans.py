"""The kernels of local_soft_kmeans."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "local_soft_kmeans",
        (
            "soft_usable_kernel",
            "soft_start_kernel",
            "soft_weights_kernel",
            "soft_move_kernel",
            "soft_offset_kernel",
            "nearest_kernel",
        ),
        lambda d: tokred.local_soft_kmeans(draw((2, 130, 40), d), (10, 13), (4, 5), 2, 0.05, 3),
    ),
)
