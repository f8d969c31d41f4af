"""Cases of linear_assignment: the duals prove the result."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import F64, Draw
from torch import Tensor


@op_case
def linear_assignment(draw: Draw) -> Case:
    shape = (draw.batch(), draw.size(), draw.size())
    cost, maximize = draw.floats(shape, draw.dtype()), draw.chance(0.4)
    kind = draw.choice(["as drawn", "few values", "one value", "product"])
    if kind == "few values":
        values = torch.randint(-3, 4, shape, generator=draw.generator())
        cost = values.to(cost.dtype) * draw.choice([1, 0.25, 1e-3])
    elif kind == "one value":
        cost = torch.full_like(cost, draw.choice([0.0, -0.7, 1e4]))
    elif kind == "product":
        sides = [torch.arange(1.0, n + 1).to(cost.dtype) for n in shape[1:]]
        cost = (sides[0][:, None] * sides[1]).repeat(shape[0], 1, 1)
    if draw.chance(0.4):
        hidden = torch.rand(shape, generator=draw.generator()) < draw.choice([0.1, 0.5, 0.9])
        cost = cost.masked_fill(hidden, -torch.inf if maximize else torch.inf)
    if draw.chance(0.1):
        cost = draw.spoiled(cost)
    some: dict[str, Any] = {"cost": cost, "maximize": maximize, "check": draw.chance(0.3)}
    return Case(
        "linear_assignment",
        some,
        check=lambda out: _check(cost, maximize, out),
        batched=("cost",),
        refusable=some["check"],
    )


def _check(cost: Tensor, maximize: bool, out: Any) -> None:
    sign = -1 if maximize else 1
    for item, (costs, index, u, v) in enumerate(zip(cost, *out, strict=True)):
        problem = _problem(sign * costs.to(F64), index, sign * u, sign * v)
        if problem:
            raise Mismatch(f"item {item}: {problem}")


def _problem(costs: Tensor, index: Tensor, u: Tensor, v: Tensor) -> str:
    rows = (index >= 0).nonzero()[:, 0]
    if u.isnan().any() or v.isnan().any():
        both = u.isnan().all() and v.isnan().all() and not len(rows)
        solvable = not costs.isinf().any() and not costs.isnan().any() and costs.numel()
        return "it is marked in part, or without cause" if not both or solvable else ""
    columns = index[rows].long()
    if len(rows) != min(costs.shape) or len(columns.unique()) != len(columns):
        return "the pairs are not one to one"
    size = float(costs[costs < torch.inf].abs().max()) if (costs < torch.inf).any() else 0.0
    slack = costs - u[:, None] - v
    if not (slack >= -1e-12 * size).all() or not (slack[rows, columns] <= 1e-12 * size).all():
        return "the duals do not prove it"
    left = [torch.ones(len(dual), dtype=torch.bool) for dual in (u, v)]
    left[0][rows], left[1][columns] = False, False
    if u[left[0]].any() or v[left[1]].any():
        return "a dual of what is left over is not 0"
    wide = v if len(u) <= len(v) else u
    return "a dual is positive" if len(u) != len(v) and (wide > 0).any() else ""
