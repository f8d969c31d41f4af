"""The kernels of knn_reconstruct."""

from __future__ import annotations

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
)
