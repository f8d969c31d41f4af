"""A call that launches the kernels of sinkhorn."""

import torch
from case import namespace
from launches import Call, draw

import tokred

CALLS = (
    Call(
        "sinkhorn",
        ("sinkhorn_cost_kernel", "sinkhorn_kernel", "sinkhorn_aggregation_kernel"),
        lambda device: tokred.sinkhorn(draw((3, 70, 40), device), draw((3, 50, 40), device)),
    ),
    Call(
        "sinkhorn_backward",
        (
            "sinkhorn_cost_kernel",
            "sinkhorn_again_kernel",
            "sinkhorn_norm_kernel",
            "sinkhorn_weight_kernel",
            "sinkhorn_back_kernel",
            "sinkhorn_row_gradient_kernel",
        ),
        lambda device: namespace().sinkhorn_backward.default(
            draw((3, 50, 40), device),
            draw((3, 50), device),
            draw((3, 70, 40), device),
            draw((3, 50, 40), device),
            *[None] * 7,
            torch.full((3,), 4, dtype=torch.int32, device=device),
            0.5,
            1.5,
            0.1,
            9,
        ),
    ),
)
