"""A call that launches the kernel of linear_assignment."""

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "linear_assignment",
        ("linear_assignment_kernel",),
        lambda device: tokred.linear_assignment(draw((3, 40, 50), device)),
    ),
)
