"""Cases of sinkhorn: beside plain torch, at a number of steps that is given."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from draw import Draw

from tokred import reference


@op_case
def sinkhorn(draw: Draw) -> Case:
    batch, channels = draw.batch(), draw.channels()
    sides = {"x": draw.size(), "anchors": draw.size()}
    some: dict[str, Any] = {}
    dtype, loose = draw.dtype(), []
    extras = [name for name in ("position", "time", "mask") if draw.chance(0.4)]
    for name, count in sides.items():
        some[name] = draw.floats((batch, count, channels), dtype, plain=True)
        if "position" in extras:
            some[f"position_{name}"] = torch.rand(batch, count, 2, generator=draw.generator())
        if "time" in extras:
            time = torch.randint(0, 5, (batch, count), generator=draw.generator())
            some[f"time_{name}"] = time.float()
            loose.append(f"time_{name}")
        if "mask" in extras:
            some[f"mask_{name}"] = draw.mask((batch, count))
            loose.append(f"mask_{name}")
    if draw.chance(0.2):
        some["offset"] = torch.rand(batch, generator=draw.generator())
        loose.append("offset")
    some["eps"] = draw.choice([0.1, 0.5, 0.05])
    some["iterations"] = draw.choice([1, 2, 7])
    some["tolerance"] = 0.0
    batched = tuple(name for name in some if name not in ("eps", "iterations", "tolerance"))
    return Case(
        "sinkhorn",
        some,
        plain=lambda **arguments: reference.sinkhorn(**arguments)[:3],
        slack=1e-4,
        batched=batched,
        loose=tuple(loose),
        measure=lambda out: out[:3],
    )
