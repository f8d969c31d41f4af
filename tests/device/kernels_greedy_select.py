"""The kernels of greedy_select."""

from __future__ import annotations

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "greedy_select",
        ("greedy_prepare_kernel", "greedy_isolated_kernel", "greedy_select_kernel"),
        lambda d: tokred.greedy_select(draw((2, 70, 40), d), 9, first="isolated"),
    ),
    Call(
        "greedy_select in parts",
        ("greedy_select_kernel",),
        lambda d: tokred.greedy_select(draw((1, 1200, 120), d), 3, metric="l2"),
    ),
    Call(
        "greedy_select, facility",
        ("facility_start_kernel", "facility_gains_kernel", "facility_select_kernel"),
        lambda d: tokred.greedy_select(draw((2, 70, 40), d), 9, "facility", first="norm"),
    ),
)
