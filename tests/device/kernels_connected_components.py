"""The kernels of connected_components."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "connected_components",
        ("grid_edges_kernel", "grid_labels_kernel"),
        lambda d: tokred.connected_components(draw((2, 23, 31, 5), d), 3.0),
    ),
)
