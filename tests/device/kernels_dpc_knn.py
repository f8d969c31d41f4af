"""The kernels of dpc_knn."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "dpc_knn",
        (
            "clear_centers_kernel",
            "knn_density_kernel",
            "density_peaks_kernel",
            "place_centers_kernel",
            "assign_centers_kernel",
        ),
        lambda d: tokred.dpc_knn(draw((2, 70, 40), d), 9),
    ),
)
