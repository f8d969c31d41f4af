"""A call that launches the kernels of adjacent_runs."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "adjacent_runs",
        ("adjacent_cosine_kernel", "adjacent_runs_kernel"),
        lambda d: tokred.adjacent_runs(draw((2, 1100, 24), d), 0.1, max_length=5, num_locals=3).ids,
    ),
)
