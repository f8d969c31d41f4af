"""linear_assignment: the duals prove the assignment, and scipy finds none that costs less."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label

COSTS = ("uniform", "normal", "cosine", "distance", "ties", "constant", "product", "forbidden")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    rows: int = 13
    columns: int = 13
    costs: str = "uniform"
    maximize: bool = False
    dtype: torch.dtype = torch.float32
    batch: int = 2

    def cost(self) -> Tensor:
        shape, rng = (self.batch, self.rows, self.columns), generator(self.rows)
        if self.costs in ("cosine", "distance"):
            x, y = (torch.randn(self.batch, n, 6, generator=rng) for n in shape[1:])
            cosine = torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
            cost = torch.cdist(x, y) if self.costs == "distance" else 1 - cosine
        elif self.costs == "ties":
            cost = torch.randint(-2, 3, shape, generator=rng).float()
        elif self.costs == "constant":
            cost = torch.full(shape, -0.7)
        elif self.costs == "product":  # the hardest for augmenting paths
            cost = torch.arange(1.0, self.rows + 1)[:, None] * torch.arange(1.0, self.columns + 1)
            cost = cost.repeat(self.batch, 1, 1)
        else:
            cost = torch.randn(shape, generator=rng)
            cost = torch.rand(shape, generator=rng) if self.costs == "uniform" else cost
        if self.costs == "forbidden":
            hidden = torch.rand(shape, generator=rng) < 0.6
            hidden.diagonal(dim1=1, dim2=2).fill_(False)
            cost[hidden] = -torch.inf if self.maximize else torch.inf
        return cost.to(self.dtype)


SIZES = [(1, 1), (1, 9), (9, 1), (16, 16), (17, 33), (40, 7), (7, 40), (33, 32)]
EMPTY = [(0, 0), (0, 4), (4, 0)]
CASES = [
    *(Case(*size, dtype=dtype) for size in [*SIZES, *EMPTY] for dtype in (*FLOATS, torch.float64)),
    *(
        Case(rows, columns, costs, maximize)
        for rows, columns in [(13, 13), (12, 21), (21, 12)]
        for costs in COSTS
        for maximize in (False, True)
    ),
    *(Case(24, 24, costs, dtype=torch.bfloat16) for costs in COSTS),
    Case(batch=0),
]


def check(cost: Tensor, maximize: bool, result: tuple[Tensor, Tensor, Tensor]) -> None:
    """The proof: duals below all costs, equal on the pairs, zero where nothing is paired."""
    index, row_dual, column_dual = result
    assert index.dtype == torch.int32 and index.shape == cost.shape[:2]
    assert row_dual.dtype == column_dual.dtype == torch.float64
    assert row_dual.shape == cost.shape[:2] and column_dual.shape == cost.shape[::2]
    sign = -1 if maximize else 1
    for item in range(cost.shape[0]):
        costs, u, v = sign * cost[item].double(), sign * row_dual[item], sign * column_dual[item]
        rows = (index[item] >= 0).nonzero()[:, 0]
        columns = index[item, rows].long()
        assert len(rows) == min(costs.shape) and len(columns.unique()) == len(columns)
        finite = costs[costs < torch.inf]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        slack = costs - u[:, None] - v
        assert (slack >= -1e-13 * size).all()
        assert (slack[rows, columns].abs() <= 1e-13 * size).all()
        for dual, paired, short in ((u, rows, len(u) <= len(v)), (v, columns, len(v) <= len(u))):
            left_over = torch.ones(len(dual), dtype=torch.bool)
            left_over[paired] = False
            assert dual[left_over].eq(0).all()
            assert short or (dual <= 0).all()
        total = costs[rows, columns].sum()
        assert abs(float(u.sum() + v.sum() - total)) <= 1e-12 * size * (1 + len(rows))
        best = costs[linear_sum_assignment(costs.numpy())].sum()
        assert abs(float(total - best)) <= 1e-13 * size * (1 + len(rows))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_duals_prove_it(backend: Backend, case: Case) -> None:
    cost = case.cost()
    check(cost, case.maximize, backend.run("linear_assignment", cost, case.maximize))


LARGE = [
    *(Case(150, 150, costs) for costs in COSTS),
    Case(130, 400),
    Case(400, 130, "cosine"),
    Case(70, 70, "ties", dtype=torch.float64),
    Case(200, 210, "constant"),
]


@pytest.mark.parametrize("case", LARGE, ids=label)
def test_many_columns(kernels: Backend, case: Case) -> None:
    """More than a list of cheapest columns, or a block's threads."""
    case = replace(case, batch=1)
    cost = case.cost()
    check(cost, case.maximize, kernels.run("linear_assignment", cost, case.maximize))


def test_more_columns_than_shared_memory_holds(kernels: Backend) -> None:
    cost = Case(3, 5000, "ties", batch=2).cost()
    check(cost, False, kernels.run("linear_assignment", cost))


def test_integers_are_exact(backend: Backend) -> None:
    cost = torch.randint(0, 10**6, (3, 20, 20), generator=generator()).float()
    index, row_dual, column_dual = backend.run("linear_assignment", cost)
    total = cost.gather(2, index.long()[..., None]).double().sum((1, 2))
    assert torch.equal(row_dual.sum(1) + column_dual.sum(1), total)
    slack = cost - row_dual[..., None] - column_dual[:, None]
    assert slack.min() == 0
    for costs, found in zip(cost.double().numpy(), total, strict=True):
        assert costs[linear_sum_assignment(costs)].sum() == found


@pytest.mark.parametrize("scale", [1e-38, 1e-6, 1e30, 3e38])
def test_costs_of_any_size(backend: Backend, scale: float) -> None:
    """Sums of the largest float32 are beyond float32, and inside float64."""
    cost = (torch.rand(2, 18, 18, generator=generator()) * 2 - 1) * scale
    check(cost, False, backend.run("linear_assignment", cost))


def test_a_cost_that_outweighs_all_others(backend: Backend) -> None:
    """A huge number in place of inf keeps the digits of the rest."""
    cost = torch.rand(1, 24, 24, generator=generator())
    cost[torch.rand(cost.shape, generator=generator(1)) < 0.5] = 1e6
    check(cost, False, backend.run("linear_assignment", cost))


def test_views_equal_their_copies(kernels: Backend) -> None:
    cost = torch.randn(9, 3, 30, generator=generator()).transpose(0, 1)[..., 5:17]
    shared = torch.randn(1, 8, 12, generator=generator()).expand(3, 8, 12)
    for view in (cost, cost[:, ::2], shared):
        copied = kernels.run("linear_assignment", view.contiguous())
        assert_bitwise_equal(kernels.run("linear_assignment", view), copied)


@pytest.mark.parametrize("case", [Case(20, 31, batch=6), Case(31, 20, "ties", True, batch=6)])
def test_batch_does_not_matter(kernels: Backend, case: Case) -> None:
    cost = case.cost()
    whole = kernels.run("linear_assignment", cost, case.maximize)
    for item in range(case.batch):
        one = slice(item, item + 1)
        alone = kernels.run("linear_assignment", cost[one], case.maximize)
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item} alone")


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("costs", ["cosine", "ties"])
def test_isa_and_threads_do_not_matter(on_every_cpu, costs: str, batch: int) -> None:
    cost = Case(90, 90, costs, batch=batch).cost()
    assert_one_result(on_every_cpu(lambda: tokred.linear_assignment(cost)))


def test_costs_that_require_grad_are_detached() -> None:
    cost = torch.rand(1, 4, 5, requires_grad=True)
    result = tokred.linear_assignment(cost)
    assert not result.row_dual.requires_grad and not result.column_dual.requires_grad
