"""A call that launches the kernels of sinkhorn."""

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "sinkhorn",
        ("sinkhorn_cost_kernel", "sinkhorn_kernel", "sinkhorn_aggregation_kernel"),
        lambda device: tokred.sinkhorn(draw((3, 70, 40), device), draw((3, 50, 40), device)),
    ),
)
