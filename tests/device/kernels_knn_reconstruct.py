"""The kernels of knn_reconstruct."""

from __future__ import annotations

from case import namespace
from launches import Call, draw

import tokred

CALLS = (
    Call(
        "knn_reconstruct",
        ("knn_reconstruct_kernel",),
        lambda d: tokred.knn_reconstruct(
            draw((2, 70, 40), d), draw((2, 90, 24), d), draw((2, 70, 24), d), 36
        ),
    ),
    Call(
        "knn_reconstruct_backward",
        ("knn_neighbours_kernel", "knn_reconstruct_backward_kernel"),
        lambda d: namespace().knn_reconstruct_backward.default(
            draw((2, 90, 40), d), draw((2, 90, 24), d), draw((2, 70, 24), d), 36, 0.05, "l2"
        ),
    ),
)
