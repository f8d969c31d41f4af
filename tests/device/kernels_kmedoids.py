"""The kernels of kmedoids."""

from __future__ import annotations

from launches import Call, draw, whole

import tokred

CALLS = (
    Call(
        "kmedoids",
        (
            "kmedoids_start_kernel",
            "kmedoids_tokens_kernel",
            "kmedoids_round_kernel",
            "kmedoids_pack_kernel",
            "nearest_kernel",
            "kmedoids_members_kernel",
            "distance_sums_kernel",
            "kmedoids_choose_kernel",
            "kmedoids_number_kernel",
            "kmedoids_renumber_kernel",
        ),
        lambda d: tokred.kmedoids(draw((2, 150, 40), d), 12, 2, whole(150, (2, 12), d)),
    ),
)
