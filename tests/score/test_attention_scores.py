"""attention_rows, attention_columns and pagerank against their float64 oracles, and bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference

REDUCTIONS = ("sum", "mean", "max", "variance")
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 19
    keys: int = 23
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = False
    mask: str = "none"
    weight: str = "none"
    magnitude: float = 1.0
    scale: float | None = None
    layout: str = "heads"

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """q, k, and what all three ops take besides."""
        rng = generator(1)
        q = torch.randn(self.batch, self.heads_q, self.queries, self.head_dim, generator=rng)
        k = torch.randn(self.batch, self.heads_kv, self.keys, self.head_dim, generator=rng)
        q = q * self.magnitude
        if self.layout == "tokens":
            q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        shapes = {
            "keys": (self.batch, 1, 1, self.keys),
            "heads": (1, self.heads_q, 1, self.keys),
            "pairs": (1, 1, self.queries, self.keys),
            "full": (self.batch, self.heads_q, self.queries, self.keys),
        }
        mask = None
        if self.mask == "nothing":
            mask = torch.zeros(1, 1, 1, self.keys, dtype=torch.bool)
        elif self.mask != "none":
            mask = torch.rand(shapes[self.mask], generator=rng) < 0.6
        options = {"causal": self.causal, "scale": self.scale, "mask": mask}
        return q.to(self.dtype), k.to(self.dtype), options

    def make_weight(self) -> Tensor | None:
        shapes = {
            "full": (self.batch, self.heads_q, self.queries),
            "shared": (1, 1, self.queries),
            "heads": (1, self.heads_q, self.queries),
        }
        if self.weight == "none":
            return None
        return torch.randn(shapes[self.weight], generator=generator(2))


def wide(values: Any) -> Any:
    """The same in float64 where it is floating."""
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {name: wide(value) for name, value in values.items()}
    return values


def make_lse(q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
    """float32, as biased_attention returns it."""
    logits = reference.attention_rows(q.double(), k.double(), softmax=False, **options)
    padded = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    return padded.logsumexp(-1).float()


def run(backend: Backend, op: str, q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """The public function, or on the emulated device its op, which takes positions only."""
    if backend.name != "simt":
        return backend.run(op, q, k, **options)
    shared = [options.get("causal", False), options.get("scale"), options.get("mask")]
    if op == "attention_rows":
        first, last = options.get("denominator") or (0, k.shape[2])
        own = [options.get("softmax", True), first, last]
    elif op == "attention_columns":
        own = [options["lse"], options.get("reduce", "sum"), options.get("weight")]
    else:
        rounds, damping = options.get("iterations", 5), options.get("damping", 0.0)
        own = [options["lse"], rounds, damping, options.get("start")]
    return backend.run(op, q, k, *own, *shared)


def check(backend: Backend, op: str, case: Case, slack: float, **own: Any) -> None:
    """As accurate as plain torch, on float32 results of the right shape."""
    q, k, options = case.inputs()
    options = options | own
    exact = getattr(reference, op)(q.double(), k.double(), **wide(options))
    plain = getattr(reference, op)(q, k, **options)
    actual = run(backend, op, q, k, **options)
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    assert_as_accurate(actual, exact, plain, slack)


ROW_CASES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 6, 2, 1, 40, 24),
    Case(1, 8, 1, 2, 37, 128),
    Case(1, 3, 3, 5, 600, 80),
    Case(1, 4, 1, 3, 1100, 256),
    Case(1, 1, 1, 15, 97, 20),
    Case(1, 4, 2, 70, 210, 72, causal=True, mask="keys"),
    Case(1, 1, 1, 90, 130, 256, mask="pairs", layout="tokens"),
    Case(causal=True),
    Case(queries=30, keys=20, causal=True),
    Case(mask="keys"),
    Case(mask="full", causal=True, heads_q=6),
    Case(mask="heads"),
    Case(mask="nothing"),
    Case(magnitude=30, scale=1.0),
    Case(layout="tokens", mask="pairs", scale=0.5),
    Case(keys=0),
    Case(queries=0),
    Case(batch=0),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ROW_CASES, ids=label)
def test_rows_against_float64(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    slack = 8 * EPS * (1 + 8 * case.magnitude)
    check(backend, "attention_rows", case, slack)
    check(backend, "attention_rows", case, 8 * slack, softmax=False)
    if case.magnitude == 1:
        ranges = [(0, case.keys // 2), (case.keys // 3, case.keys), (0, 0)]
        if backend.name == "simt":  # it takes half a second a call: one of them with each dtype
            ranges = [ranges[FLOATS.index(dtype)]]
        for denominator in ranges:
            own = {"denominator": denominator}
            check(backend, "attention_rows", replace(case, scale=0.1), 8 * slack, **own)


def test_hidden_keys_do_not_matter_to_rows(kernels: Backend) -> None:
    q, k, options = Case(queries=30, keys=210, mask="keys").inputs()
    rows = run(kernels, "attention_rows", q, k, **options)
    hidden = ~options["mask"].flatten(1)
    k.masked_fill_(hidden[:, None, :, None], torch.nan)
    assert_bitwise_equal(run(kernels, "attention_rows", q, k, **options), rows, "hidden keys")


def test_quotients_overflow_to_infinity(kernels: Backend) -> None:
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.0, 50.0, 88.5, 89.0, 200.0, -90.0]).view(1, 1, 6, 1)
    rows = run(kernels, "attention_rows", q, k, denominator=(0, 1), scale=1.0).flatten()
    torch.testing.assert_close(rows[:3].log(), k.flatten()[:3], rtol=1e-6, atol=1e-5)
    assert rows[3:].tolist() == [torch.inf, torch.inf, 0]


COLUMN_CASES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 6, 2, 33, 40, 24),
    Case(1, 8, 1, 9, 37, 128),
    Case(1, 3, 3, 200, 100, 80),
    Case(1, 4, 1, 101, 150, 256),
    Case(causal=True),
    Case(queries=30, keys=20, causal=True),
    Case(queries=100, keys=130, causal=True, mask="keys", weight="full"),
    Case(mask="keys", weight="heads"),
    Case(mask="full", causal=True, heads_q=6, weight="shared"),
    Case(mask="heads"),
    Case(mask="nothing", weight="full"),
    Case(magnitude=30, scale=1.0),
    Case(layout="tokens", mask="pairs", scale=0.5),
    Case(keys=0),
    Case(queries=0),
    Case(queries=1, causal=True),
    Case(batch=0),
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", COLUMN_CASES, ids=label)
def test_columns_against_float64(backend: Backend, case: Case, reduce: str) -> None:
    turn = COLUMN_CASES.index(case) + REDUCTIONS.index(reduce)
    case = replace(case, dtype=FLOATS[turn % 3])
    lse = make_lse(*case.inputs())
    slack = 8 * EPS * (1 + 8 * case.magnitude) * (1 + (reduce == "sum") * case.queries**0.5)
    own = {"lse": lse, "reduce": reduce, "weight": case.make_weight()}
    check(backend, "attention_columns", case, slack, **own)


def test_variance_of_nearly_equal_weights(backend: Backend) -> None:
    """Where sum of squares minus square of sum would leave nothing but rounding."""
    q = 1e-3 * torch.randn(1, 2, 500, 32, generator=generator())
    k = torch.randn(1, 2, 3, 32, generator=generator(1))
    lse = make_lse(q, k, {})
    exact = reference.attention_columns(q.double(), k.double(), lse.double(), "variance")
    actual = run(backend, "attention_columns", q, k, lse=lse, reduce="variance")
    torch.testing.assert_close(actual.double(), exact, rtol=2e-3, atol=0)


def test_lse_is_computed_where_absent(one_thread: None) -> None:
    q, k, options = Case(causal=True, mask="full", head_dim=24).inputs()
    lse = make_lse(q, k, options)
    given = tokred.attention_columns(q, k, lse=lse, **options)
    torch.testing.assert_close(tokred.attention_columns(q, k, **options), given)


def test_columns_of_the_map_sum_to_its_rows(kernels: Backend) -> None:
    q, k, options = Case(queries=70, keys=90).inputs()
    lse = make_lse(q, k, options)
    columns = run(kernels, "attention_columns", q, k, lse=lse)
    torch.testing.assert_close(columns.sum(-1), torch.full((2, 4), 70.0))


def test_queries_that_saw_nothing_give_nothing(kernels: Backend) -> None:
    q, k, options = Case().inputs()
    lse = make_lse(q, k, options)
    lse[:, :, ::2] = -torch.inf
    weight = torch.zeros(1, 1, 19)
    weight[..., 1::2] = 1
    expected = run(kernels, "attention_columns", q, k, lse=make_lse(q, k, options), weight=weight)
    torch.testing.assert_close(run(kernels, "attention_columns", q, k, lse=lse), expected)


RANK_CASES = [
    Case(queries=23),
    Case(1, 6, 2, 100, 100, 24, weight="full"),
    Case(1, 1, 1, 1, 1, 8),
    Case(queries=23, causal=True, weight="shared"),
    Case(queries=23, mask="full", layout="tokens"),
    Case(queries=0, keys=0),
]


@pytest.mark.parametrize("damping, iterations", [(0.0, 5), (0.15, 5), (0.3, 1), (1.0, 2)])
@pytest.mark.parametrize("case", RANK_CASES, ids=label)
def test_pagerank_against_float64(
    backend: Backend, case: Case, damping: float, iterations: int
) -> None:
    start = case.make_weight()
    lse = make_lse(*case.inputs())
    own = {"iterations": iterations, "damping": damping, "start": start, "lse": lse}
    check(backend, "pagerank", case, 256 * EPS, **own)


def test_pagerank_keeps_the_mass(one_thread: None) -> None:
    q, k, _ = Case(queries=23).inputs()
    for damping in (0.0, 0.2):
        total = tokred.pagerank(q, k, damping=damping).sum(-1)
        torch.testing.assert_close(total, torch.ones(2, 4))


def columns_call(case: Case, item: slice, reduce: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Arguments for some of the batch."""
    q, k, options = case.inputs()
    options |= {"lse": make_lse(q, k, options), "weight": case.make_weight()}
    part = {
        name: t[item] if isinstance(t, Tensor) and t.shape[0] > 1 else t
        for name, t in options.items()
    }
    return q[item], k[item], part | {"reduce": reduce}


BITWISE = [
    Case(3, 4, 2, 70, 133, 40, mask="full", weight="full"),
    Case(3, 6, 2, 210, 200, 64, causal=True, mask="keys"),
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case, reduce: str) -> None:
    def columns(item: slice) -> Tensor:
        q, k, options = columns_call(replace(case, dtype=torch.bfloat16), item, reduce)
        return run(kernels, "attention_columns", q, k, **options)

    whole = columns(slice(None))
    for item in range(3):
        one = slice(item, item + 1)
        assert_bitwise_equal(columns(one), whole[one], f"item {item}")


@pytest.mark.parametrize("queries", [3, 19])
def test_batch_does_not_matter_to_rows(kernels: Backend, queries: int) -> None:
    q, k, options = Case(3, 4, 2, queries, 1300, 40, mask="full", dtype=torch.bfloat16).inputs()
    mask = options["mask"]
    whole = run(kernels, "attention_rows", q, k, mask=mask)
    for item in range(3):
        one = slice(item, item + 1)
        alone = run(kernels, "attention_rows", q[one], k[one], mask=mask[one])
        assert_bitwise_equal(alone, whole[one], f"item {item}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu: Any, case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    calls = [columns_call(case, slice(None), reduce) for reduce in REDUCTIONS]
    rows_calls = [replace(case, queries=queries, keys=1300).inputs() for queries in (3, 19)]

    def results() -> list[Tensor]:
        results = [tokred.attention_columns(q, k, **own) for q, k, own in calls]
        for q, k, options in rows_calls:
            for own in ({}, {"denominator": (5, 700)}, {"softmax": False}):
                results.append(tokred.attention_rows(q, k, **own, **options))
        return results

    assert_one_result(on_every_cpu(results))


def test_inputs_that_require_grad_are_refused(one_thread: None) -> None:
    q, k, _ = Case(queries=23).inputs()
    weight = torch.ones(2, 4, 23, requires_grad=True)
    needing = q.clone().requires_grad_()
    for call in (
        lambda: tokred.attention_rows(needing, k),
        lambda: tokred.attention_columns(q, k, weight=weight),
        lambda: tokred.pagerank(q, k, start=weight),
    ):
        with pytest.raises(ValueError, match="grad"):
            call()
