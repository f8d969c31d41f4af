"""topk against its plain torch reference, bit by bit: integers decide, so nothing may differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference

DISTRIBUTIONS = (
    "randn", "softmax", "peaked", "ties", "constant", "special", "mostly_masked", "all_masked",
    "ascending", "descending", "clustered", "tiny", "huge",
)  # fmt: skip


def make_scores(shape: tuple[int, ...], distribution: str, seed: int = 0) -> Tensor:
    rng = generator(seed)
    x = torch.randn(shape, generator=rng)
    columns = torch.arange(shape[-1])
    if distribution == "softmax":
        return (2 * x).softmax(-1)
    if distribution == "peaked":
        x = (x * 1e-6).exp() * 1e-6
        x[..., ::50] = 1.0
    elif distribution == "ties":
        x = torch.randint(-2, 3, shape, generator=rng).float()
    elif distribution == "constant":
        x = torch.full(shape, 0.5)
    elif distribution == "special":
        kind = torch.randint(0, 8, shape, generator=rng)
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-42])
        x = torch.where(kind < 6, special[kind.clamp(max=5)], x)
    elif distribution == "mostly_masked":
        x = x.masked_fill(torch.rand(shape, generator=rng) < 0.95, -torch.inf)
    elif distribution == "all_masked":
        x = torch.full(shape, -torch.inf)
    elif distribution == "ascending":
        x = columns.float().expand(shape) / 7
    elif distribution == "descending":
        x = -columns.float().expand(shape) / 7
    elif distribution == "clustered":
        x = x + 20.0 * (columns * 8 // max(1, shape[-1]) == 3)
    elif distribution == "tiny":
        x = x * 1e-40
    elif distribution == "huge":
        x = x * 1e38
    return x.contiguous()


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    shape: tuple[int, ...] = (3, 70)
    k: int = 9
    dtype: torch.dtype = torch.float32
    distribution: str = "randn"
    order: str = "score"
    lengths: bool = False
    row_k: bool = False
    num_sinks: int = 0
    num_locals: int = 0
    must_keep: float = 0.0
    top_p: float | None = None
    min_k: int = 1
    threshold: float | None = None
    block_size: int = 0

    def inputs(self) -> dict[str, Any]:
        rng = generator(7)
        *rows, columns = self.shape
        beside = {"generator": rng, "dtype": torch.int32}
        lengths = torch.randint(-3, columns + 5, rows, **beside)
        row_k = torch.randint(-2, self.k + 4, rows, **beside)
        must_keep = torch.rand(self.shape, generator=rng) < self.must_keep
        return {
            "scores": make_scores(self.shape, self.distribution).to(self.dtype),
            "k": self.k,
            "lengths": lengths if self.lengths else None,
            "order": self.order,
            "row_k": row_k if self.row_k else None,
            "num_sinks": self.num_sinks,
            "num_locals": self.num_locals,
            "must_keep": must_keep if self.must_keep else None,
            "top_p": self.top_p,
            "min_k": self.min_k,
            "threshold": self.threshold,
            "block_size": self.block_size,
        }


ORDERS = ("score", "position")
SIZES = [
    *(Case((columns,), k) for columns, k in ((0, 3), (1, 1), (1, 5), (5, 0), (7, 7), (9, 12))),
    *(Case((2, columns), k) for columns, k in ((15, 4), (16, 16), (17, 3), (289, 64), (300, 299))),
    Case((0, 5), 3),
    Case((2, 0, 5), 3),
    Case((2, 3, 41), 5),
    Case((2, 2, 3, 33), 40),
    Case((5, 1000), 1),
    Case((2, 2047), 300),
    Case((2, 2300), 700),
]
LONG = [
    *(Case((2, 40001), k, distribution=d) for k in (10, 3000) for d in DISTRIBUTIONS),
    Case((2, 50257), 50, top_p=0.6, distribution="softmax"),
    Case((2, 20000), 500, must_keep=0.01, num_sinks=4, num_locals=64, lengths=True),
    Case((2, 20000), 100, must_keep=0.2, num_sinks=4, num_locals=64),
    Case((2, 50000), 40, threshold=3.0),
    Case((2, 50000), 40, block_size=8192, lengths=True),
]
LONGEST = [
    Case((3, 131072), 2048),
    Case((3, 131072), 2048, dtype=torch.bfloat16),
    Case((1, 131072), 131072),
    Case((2, 131072), 70000, dtype=torch.float16),
    Case((1, 1_000_003), 2048, dtype=torch.bfloat16),
    Case((1, 1_000_003), 50, lengths=True),
    Case((1, 100000), 300, row_k=True, lengths=True, distribution="special"),
]
OPTIONS = [
    *(Case(distribution=d) for d in DISTRIBUTIONS),
    *(Case(distribution=d, lengths=True, row_k=True) for d in DISTRIBUTIONS),
    *(Case(distribution=d, num_sinks=2, num_locals=3, must_keep=0.05) for d in DISTRIBUTIONS),
    *(Case(num_sinks=s, num_locals=n) for s, n in ((4, 0), (0, 4), (6, 6), (50, 50), (100, 0))),
    *(Case(must_keep=share, lengths=True) for share in (0.02, 0.2, 1.0)),
    *(Case(distribution="softmax", top_p=p, min_k=m) for p in (-1.0, 0.0, 0.4) for m in (0, 3, 99)),
    *(Case(distribution="softmax", top_p=p, k=70) for p in (0.5, 0.999, 1.0, 2.0)),
    *(Case(distribution=d, top_p=0.5, k=40, must_keep=0.05) for d in ("special", "peaked", "huge")),
    Case(distribution="huge", top_p=3e6, k=64),
    Case(distribution="huge", top_p=1e30, k=64),
    *(Case(distribution=d, threshold=0.5, k=40) for d in ("randn", "ties", "special", "constant")),
    *(Case(threshold=t, k=40, must_keep=0.1) for t in (-torch.inf, -0.0, torch.inf, 1e30)),
    *(Case((2, 70), k, block_size=b) for k, b in ((3, 16), (20, 16), (5, 70), (5, 100), (1, 1))),
    Case((2, 2, 95), 6, block_size=32, lengths=True, row_k=True, num_sinks=3, num_locals=5),
    Case((2, 95), 9, block_size=32, must_keep=0.1, top_p=0.3, distribution="softmax"),
    Case((3, 289), 64, lengths=True, row_k=True, num_sinks=1, must_keep=0.1, threshold=-0.3),
    Case((3, 289), 64, top_p=0.5, row_k=True, num_sinks=1, num_locals=9, distribution="softmax"),
]


def in_both_orders(cases: list[Case]) -> list[Case]:
    return [replace(case, order=order) for case in cases for order in ORDERS]


SMALL = [
    *(replace(c, dtype=d) for c in in_both_orders(SIZES) for d in FLOATS),
    *in_both_orders(OPTIONS),
    *(replace(c, dtype=torch.bfloat16) for c in OPTIONS),
    *(replace(c, dtype=torch.float16, order="position") for c in OPTIONS),
]


def run_topk(backend: Backend, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices, counts; the registered op is what has all three."""
    return backend.run("topk" if backend.name == "simt" else "topk_with_counts", **inputs)


def check(backend: Backend, inputs: dict[str, Any]) -> None:
    expected = reference.topk_with_counts(**inputs)
    assert_bitwise_equal(run_topk(backend, inputs), expected)


@pytest.mark.parametrize("case", SMALL, ids=label)
def test_matches_reference(kernels: Backend, case: Case) -> None:
    check(kernels, case.inputs())


@pytest.mark.parametrize("case", in_both_orders(LONG), ids=label)
def test_long_rows(kernels: Backend, case: Case) -> None:
    check(kernels, case.inputs())


@pytest.mark.parametrize("case", in_both_orders(LONGEST), ids=label)
def test_longest_rows(processors: Backend, case: Case) -> None:
    """Too long for the emulated device."""
    check(processors, case.inputs())


@pytest.mark.parametrize("case", in_both_orders(OPTIONS), ids=label)
def test_reference_follows_its_definition(case: Case) -> None:
    """The sort of every row, entry by entry, as TopkParams words it."""
    inputs = case.inputs()
    values, indices, counts = reference.topk_with_counts(**inputs)
    columns = case.shape[-1]
    segments = max(1, -(-columns // case.block_size)) if case.block_size else 1
    score = inputs["scores"].float().reshape(-1, columns).tolist()
    length = [columns] * len(score) if not case.lengths else inputs["lengths"].flatten().tolist()
    budget = [case.k] * len(score) if not case.row_k else inputs["row_k"].flatten().tolist()
    kept = torch.zeros(case.shape, dtype=torch.bool)
    kept = (inputs["must_keep"] if case.must_keep else kept).reshape(-1, columns).tolist()
    results = [
        t.reshape(len(score), segments, -1).tolist() for t in (values, indices, counts)
    ]  # fmt: skip
    for row, segment in ((r, s) for r in range(len(score)) for s in range(segments)):
        end = min(max(length[row], 0), columns)
        ranked = []
        for j in range(segment * case.block_size, columns):
            if j >= end or (case.block_size and j >= (segment + 1) * case.block_size):
                break
            x = score[row][j]
            x = -torch.inf if x != x else x
            forced = j < case.num_sinks or j >= end - case.num_locals or kept[row][j]
            limit = torch.tensor(-torch.inf if case.threshold is None else case.threshold).item()
            if forced or (x > limit and x > -torch.inf):
                ranked.append((not forced, -x, j))
        ranked.sort()
        ranked = ranked[: max(0, min(budget[row], case.k))]
        if case.top_p is not None:
            total, within = 0, 0
            for _, x, _ in ranked:
                total += int(min(max(-x, 0.0), 2.0**20) * 2**40)
                within += total <= min(case.top_p, 2.0**20) * 2**40
            ranked = ranked[: max(within + 1, case.min_k)]
        if case.order == "position":
            ranked.sort(key=lambda entry: entry[2])
        missing = case.k - len(ranked)
        assert results[0][row][segment] == [-x for _, x, _ in ranked] + [-torch.inf] * missing
        assert results[1][row][segment] == [j for _, _, j in ranked] + [-1] * missing
        assert results[2][row][segment] == [len(ranked)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape, k", [((4, 300), 30), ((2, 50257), 50), ((1, 9), 9)], ids=str)
def test_agrees_with_torch(backend: Backend, shape: tuple, k: int, dtype: torch.dtype) -> None:
    scores = make_scores(shape, "randn").to(dtype)
    values, indices, counts = run_topk(backend, {"scores": scores, "k": k})
    expected = torch.topk(scores, k)
    assert torch.equal(values, expected.values.float())
    assert torch.equal(scores.float().gather(-1, indices.long()), values)
    assert (counts == k).all()


def test_values_and_indices_alone() -> None:
    scores = make_scores((3, 50), "ties")
    assert_bitwise_equal(tokred.topk(scores, 5), tokred.topk_with_counts(scores, 5)[:2])
    assert_bitwise_equal(reference.topk(scores, 5), tokred.topk(scores, 5))


@pytest.mark.parametrize("order", ORDERS)
def test_any_strides(kernels: Backend, order: str) -> None:
    """Permuted, sliced and expanded leading dimensions; tables that broadcast."""
    base = make_scores((4, 5, 3, 80), "randn")
    views = [
        base.permute(2, 0, 1, 3),
        base[::2, :, 1:, 3:71],
        base[:1, :, :1].expand(3, 5, 4, 80),
        base[0].transpose(0, 1)[..., 1:],
        base[1, 2, 0, 5:],
    ]
    for number, scores in enumerate(views):
        rows, columns = scores.shape[:-1], scores.shape[-1]
        rng = generator(number)
        tables = torch.randint(0, columns, (*rows[:-1], 2 * (rows or (1,))[-1]), generator=rng)
        lengths = tables.int()[..., ::2].reshape(rows) if not rows else tables.int()[..., ::2]
        keep = (torch.rand((*[1] * len(rows), columns + 2), generator=rng) < 0.05)[..., 1:-1]
        row_k = torch.full([1] * len(rows), 11, dtype=torch.int32)
        inputs = {"scores": scores, "k": 14, "lengths": lengths, "order": order, "row_k": row_k}
        inputs["must_keep"] = keep
        assert_bitwise_equal(
            run_topk(kernels, inputs), reference.topk_with_counts(**inputs), f"view {number}"
        )


BITWISE = [
    Case((5, 289), 64, order="position"),
    Case((5, 289), 64, lengths=True, must_keep=0.1, row_k=True),
    Case((4, 3000), 100, distribution="ties"),
    Case((3, 200), 20, distribution="special", num_sinks=3, block_size=64),
]


@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case) -> None:
    inputs = case.inputs()
    whole = run_topk(kernels, inputs)
    assert_bitwise_equal(run_topk(kernels, inputs), whole, "again")

    def rows(index: slice | Tensor) -> dict[str, Any]:
        return {n: t[index] if isinstance(t, Tensor) else t for n, t in inputs.items()}

    order = torch.randperm(case.shape[0], generator=generator())
    assert_bitwise_equal(run_topk(kernels, rows(order)), [t[order] for t in whole], "permuted")
    for row in range(case.shape[0]):
        one = slice(row, row + 1)
        assert_bitwise_equal(
            run_topk(kernels, rows(one)), [t[one] for t in whole], f"row {row} alone"
        )


ISA_CASES = [
    *BITWISE,
    Case((1, 131072), 2048),
    Case((3, 70001), 100, dtype=torch.bfloat16, distribution="softmax", order="position"),
    Case((1, 70001), 100, distribution="clustered"),
    Case((1, 70001), 3000, distribution="ties", order="position"),
    Case((1, 70001), 300, distribution="special", must_keep=0.001, num_locals=100),
    Case((700, 65), 7, dtype=torch.float16, distribution="ties"),
]


@pytest.mark.parametrize("case", ISA_CASES, ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case) -> None:
    inputs = case.inputs()
    results = on_every_cpu(lambda: tokred.topk_with_counts(**inputs))
    expected = reference.topk_with_counts(**inputs)
    for name, result in results.items():
        assert_bitwise_equal(result, expected, name)


def random_case(seed: int) -> Case:
    rng = generator(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    columns = pick(1, 13, 64, 100, 257, 600)
    return Case(
        shape=(pick(1, 2, 5), columns),
        k=pick(0, 1, 5, columns // 3, columns, columns + 3),
        dtype=pick(*FLOATS),
        distribution=pick(*DISTRIBUTIONS),
        order=pick(*ORDERS),
        lengths=pick(False, True),
        row_k=pick(False, True),
        num_sinks=pick(0, 0, 3, columns // 2),
        num_locals=pick(0, 0, 5, columns // 2),
        must_keep=pick(0.0, 0.02, 0.5),
        top_p=pick(None, None, 0.1, 0.8, 5.0),
        min_k=pick(0, 1, 4),
        threshold=pick(None, None, 0.0, 0.7, -1.0),
        block_size=pick(0, 0, 16, 50),
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_options(kernels: Backend, seed: int) -> None:
    for number in range(6 if kernels.name == "simt" else 40):
        case = random_case(1000 * seed + number)
        inputs = case.inputs()
        assert_bitwise_equal(
            run_topk(kernels, inputs), reference.topk_with_counts(**inputs), label(case)
        )


def test_scores_that_require_grad_are_detached() -> None:
    values, _ = tokred.topk(torch.randn(2, 8, requires_grad=True), 3)
    assert not values.requires_grad
