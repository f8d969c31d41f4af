"""A call that launches the kernel of match with k > 1."""

from launches import Call, draw

import tokred

CALLS = (
    Call(
        "match, k = 4",
        ("match_many_kernel",),
        lambda device: tokred.match(draw((2, 70, 40), device), draw((2, 90, 40), device), k=4),
    ),
)
