"""Cases of local_soft_kmeans."""

from __future__ import annotations

from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor

import tokred

_CHANNELS = (0, 1, 2, 3, 8, 15, 16, 17, 33, 64)


@op_case
def local_soft_kmeans(draw: Draw) -> Case:
    grid = draw.choice([0, 1, 2, 5, 8, 13]), draw.choice([1, 3, 4, 7])
    clusters = draw.randrange(0, grid[0] + 1), draw.randrange(0, grid[1] + 1)
    batch, channels = draw.batch(), draw.choice(_CHANNELS)
    spoiled = draw.chance(0.2)
    x = draw.floats((batch, grid[0] * grid[1], channels), draw.dtype(), plain=True)
    if spoiled:
        x = draw.spoiled(x)
    some = {"x": x, "grid": grid, "clusters": clusters}
    some["iterations"] = draw.choice([0, 1, 3])
    some["temperature"] = draw.choice([0.0, 0.05, 0.3])
    some["window"] = draw.choice([1, 3, 7])

    def check(out: list[Tensor]) -> None:
        _, assignment = out
        if ((assignment < -1) | (assignment >= max(clusters[0] * clusters[1], 1))).any():
            raise Mismatch("an assignment out of range")

    def plain(**arguments: object) -> Tensor:
        return tokred.reference.local_soft_kmeans(**arguments)[0]

    return Case(
        "local_soft_kmeans",
        some,
        check=check if spoiled else None,
        plain=None if spoiled else plain,
        measure=lambda out: out if isinstance(out, Tensor) else out[0],
        slack=1e-4,
        batched=("x",),
    )
