"""Bad input of linear_assignment: shapes and dtypes, costs that are no numbers, no assignment."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.backends import Backend
from cases.bad_input import names_the_argument

COST = torch.arange(24.0).reshape(2, 3, 4)
INF = torch.inf


def spoiled(value: float, *at: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    cost = COST.to(dtype, copy=True)
    cost[at] = value
    return cost


CASES = [
    (tokred.linear_assignment, (COST[0],), {}, "cost must have 3 dimensions"),
    (tokred.linear_assignment, (COST.int(),), {}, "cost must be float32, float16 or bfloat16"),
    (tokred.linear_assignment, (COST.mT,), {}, "cost must be contiguous in its last dimension"),
    (
        tokred.linear_assignment,
        (torch.zeros(1, 1, 1).expand(1, 2**24 + 1, 1),),
        {},
        "cost may have at most 2\\^24",
    ),
    (
        tokred.linear_assignment,
        (spoiled(torch.nan, 1, 2, 3),),
        {},
        "cost of item 1, row 2, column 3",
    ),
    (tokred.linear_assignment, (spoiled(-INF, 1, 0, 1),), {}, "item 1, row 0, column 1 must"),
    (tokred.linear_assignment, (spoiled(INF, 0, 1, 2), True), {}, "-inf .a forbidden pair, with"),
    (
        tokred.linear_assignment,
        (spoiled(torch.nan, 0, 1, 2).mT.contiguous(),),
        {},
        "item 0, row 2, column 1 must be a number",
    ),
    (
        tokred.linear_assignment,
        (spoiled(2.0**960, 1, 2, 3, dtype=torch.float64),),
        {},
        "number below 2.960",
    ),
    (tokred.linear_assignment, (spoiled(INF, 1, 2),), {}, "in item 1, row 2 finds no partner"),
    (
        tokred.linear_assignment,
        (spoiled(INF, 1, 2).mT.contiguous(),),
        {},
        "in item 1, column 2 finds no partner",
    ),
]
test_bad_linear_assignment = names_the_argument(CASES)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("value", [torch.nan, -INF, INF])
def test_an_item_without_an_assignment_is_marked(
    backend: Backend, value: float, tall: bool
) -> None:
    """The others are not touched by it."""
    cost = COST.repeat(2, 1, 1)
    cost[1, 0] = value
    cost = cost.mT.contiguous() if tall else cost
    index, row_dual, column_dual = backend.run("linear_assignment", cost, False, False)
    assert index[1].eq(-1).all() and row_dual[1].isnan().all() and column_dual[1].isnan().all()
    good = [0, 2, 3]
    for found, alone in zip(
        (index, row_dual, column_dual),
        backend.run("linear_assignment", cost[good]),
        strict=True,
    ):
        assert torch.equal(found[good], alone)


def test_two_rows_that_share_their_only_column(backend: Backend) -> None:
    cost = torch.zeros(1, 5, 9)
    cost[0, 3:, 1:] = INF
    index, _, _ = backend.run("linear_assignment", cost, check=False)
    assert index.eq(-1).all()
