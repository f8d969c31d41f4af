"""qk_score, block_pool and block_score against their float64 oracles, and bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import (
    FLOATS,
    Backend,
    assert_as_accurate,
    assert_bitwise_equal,
    assert_one_result,
    flat,
    generator,
    label,
)
from torch import Tensor

import tokred
from tokred import reference

REDUCTIONS = ("none", "group_mean", "group_max", "head_mean", "softmax_vote")
EPS = torch.finfo(torch.float32).eps


def wide(inputs: tuple) -> tuple:
    """The inputs with their floats in float64."""
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    )


def grid(cases: list, field: str, values: tuple[str, ...]) -> list:
    """Every case with every value of a field, the dtypes taking turns."""
    return [
        replace(case, **{field: value, "dtype": FLOATS[(i + j) % 3]})
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call of qk_score."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 1
    keys: int = 37
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    reduce: str = "none"
    dims: str = "none"
    lengths: bool = False
    mask: str = "none"
    slots: bool = False
    scale: float | None = None
    layout: str = "heads"

    def make_dims(self, rng: torch.Generator) -> Tensor | None:
        if self.dims == "none":
            return None
        count = {"few": 5, "invalid": 7, "all": self.head_dim}[self.dims]
        order = [torch.randperm(self.head_dim, generator=rng) for _ in range(self.heads_q)]
        dims = torch.stack(order)[:, :count].int()
        if self.dims == "invalid":
            dims[:, ::3] = torch.tensor(-1)
            dims[:, 1::3] = torch.tensor(2**31 - 1)
            dims[0] = self.head_dim
        return dims

    def inputs(self) -> tuple:
        rng = generator(3)
        stored = self.keys + 9 if self.slots else self.keys
        batch = 1 if self.slots else self.batch
        q = torch.randn(self.batch, self.heads_q, self.queries, self.head_dim, generator=rng)
        k = torch.randn(batch, self.heads_kv, stored, self.head_dim, generator=rng)
        if self.layout == "tokens":
            q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        lengths = mask = slots = None
        if self.lengths:
            choices = torch.tensor([self.keys // 2, -3, self.keys + 100, 1])
            lengths = choices.repeat(self.batch)[: self.batch].int()
        if self.mask != "none":
            rows = 1 if self.mask == "shared" else self.batch
            mask = torch.rand(rows, self.keys, generator=rng) < 0.7
            mask &= self.mask != "nobody"
        if self.slots:
            shape = (self.batch, self.keys)
            slots = torch.randint(0, max(stored, 1), shape, generator=rng).int()
            slots[:, ::5] = -1
            slots[:, 1::7] = 2**31 - 1
            slots[:, 2::11] = -(2**31)
            slots[:, 3::13] = stored
        dims = self.make_dims(rng)
        return (
            *(t.to(self.dtype) for t in (q, k)),
            *(self.reduce, dims, self.scale, lengths, mask, slots),
        )


SIZES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 3, 3, 1, 5, 24),
    Case(1, 6, 2, 3, 33, 80),
    Case(3, 8, 1, 1, 21, 128),
    Case(1, 10, 2, 2, 18, 256),
    Case(1, 2, 1, 1, 530, 17),
    Case(1, 2, 2, 1, 1100, 8),
    Case(2, 4, 2, 1, 0, 16),
    Case(0, 4, 2, 1, 7, 16),
]
OPTIONS = [
    Case(lengths=True, batch=4),
    Case(mask="keys"),
    Case(mask="shared", keys=600, head_dim=16),
    Case(mask="nobody"),
    Case(slots=True),
    Case(slots=True, lengths=True, mask="keys", batch=4),
    Case(dims="few"),
    Case(dims="all", heads_q=6, heads_kv=2, head_dim=20),
    Case(dims="invalid", mask="keys", keys=70),
    Case(dims="few", slots=True, lengths=True, batch=4, heads_q=9, heads_kv=3),
    Case(dims="few", queries=3, layout="tokens", keys=530),
    Case(scale=3.0, layout="tokens", keys=53, queries=2),
]


def check_accuracy(actual: Tensor, exact: Tensor, plain: Tensor, magnitude: float) -> None:
    """As accurate as plain torch, up to a few units in the last place of the magnitude."""
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    assert_as_accurate(actual, exact, plain, 8 * EPS * (1 + magnitude))


def largest(x: Tensor) -> float:
    """Of the finite magnitudes."""
    x = x[x.isfinite()].abs()
    return x.max().item() if len(x) else 0.0


@pytest.mark.parametrize("case", grid([*SIZES, *OPTIONS], "reduce", REDUCTIONS), ids=label)
def test_qk_score_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    exact = reference.qk_score(*wide(inputs))
    logits = reference.qk_score(*wide((*inputs[:2], "none", *inputs[3:])))
    plain = reference.qk_score(*inputs)
    check_accuracy(backend.run("qk_score", *inputs), exact, plain, largest(logits))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_hidden_keys_may_hold_anything(kernels: Backend, reduce: str) -> None:
    case = Case(keys=75, mask="keys", slots=True, lengths=True, batch=4, reduce=reduce)
    q, k, *options = case.inputs()
    slots, mask, lengths = options[5], options[4], options[3]
    seen = mask & (torch.arange(75) < lengths[:, None]) & (slots >= 0) & (slots < k.shape[2])
    k[:, :, ~torch.isin(torch.arange(k.shape[2]), slots[seen])] = torch.nan
    clean = k.nan_to_num(0)
    expected = kernels.run("qk_score", q, clean, *options)
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options), expected)
    hidden = 0 if reduce == "softmax_vote" else -torch.inf
    assert (expected[~seen[:, None].expand_as(expected)] == hidden).all()


def test_dimensions_left_out_may_hold_anything(kernels: Backend) -> None:
    q, k, *options = Case(dims="few", heads_q=2, keys=70).inputs()
    expected = kernels.run("qk_score", q, k, *options)
    unused = torch.ones(2, 64, dtype=torch.bool).scatter(1, options[1].long(), False)
    k.transpose(2, 3)[:, unused] = torch.inf
    q.transpose(2, 3)[:, unused] = torch.nan
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options), expected)


def test_repeated_dimensions_count_every_time(backend: Backend) -> None:
    q, k, *_ = Case().inputs()
    once = backend.run("qk_score", q, k, "none", torch.full((4, 1), 3, dtype=torch.int32))
    twice = backend.run("qk_score", q, k, "none", torch.full((4, 2), 3, dtype=torch.int32))
    torch.testing.assert_close(twice, 2 * once)


def test_slots_are_a_gather(kernels: Backend) -> None:
    q, k, *options = Case(slots=True, keys=40).inputs()
    slots = options[5].clamp(0, k.shape[2] - 1)
    gathered = k[0][:, slots.long()].transpose(0, 1)
    direct = kernels.run("qk_score", q, gathered, *options[:5])
    assert_bitwise_equal(kernels.run("qk_score", q, k, *options[:5], slots), direct)


def test_query_without_a_length(one_thread: None) -> None:
    q, k, *_ = Case().inputs()
    assert_bitwise_equal(tokred.qk_score(q[:, :, 0], k), tokred.qk_score(q, k))


@dataclass(frozen=True)
class PoolCase:
    """Sizes and options of one call of block_pool."""

    batch: int = 2
    heads: int = 3
    tokens: int = 37
    head_dim: int = 24
    block_size: int = 8
    statistic: str = "mean"
    dtype: torch.dtype = torch.float32
    boundaries: str = "none"
    lengths: bool = False
    mask: bool = False
    layout: str = "heads"

    def inputs(self) -> tuple:
        rng = generator(4)
        n = self.tokens
        x = torch.randn(self.batch, self.heads, n, self.head_dim, generator=rng) + 1
        if self.layout == "tokens":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        edges = {
            "none": None,
            "ascending": [[0, 1, n // 2, n // 2, n]],
            "wild": [[5, 2, n + 9, -7, 3, 2**31 - 1, -(2**31), 10, 9, n]],
            "single": [[0]],
            "own": [[0, i % 3, n // 2, n] for i in range(self.batch)],
        }[self.boundaries]
        boundaries = None if edges is None else torch.tensor(edges, dtype=torch.int32)
        lengths = torch.tensor([n // 2, -1, n + 5, 1]).repeat(self.batch)[: self.batch].int()
        mask = torch.rand(self.batch, n, generator=rng) < 0.5
        return (
            *(x.to(self.dtype), self.block_size if edges is None else 0, self.statistic),
            *(boundaries, lengths if self.lengths else None, mask if self.mask else None),
        )


STATISTICS = ("mean", "sqrt_mean", "min_max", "mean_deviation")
POOL_CASES = [
    PoolCase(),
    PoolCase(1, 1, 1, 1, 1),
    PoolCase(1, 2, 130, 128, 64),
    PoolCase(1, 2, 33, 256, 100),
    PoolCase(1, 2, 1100, 40, 1000, mask=True),
    PoolCase(2, 1, 700, 136, 700, layout="tokens"),
    PoolCase(2, 2, 65, 80, 16, layout="tokens"),
    PoolCase(1, 1, 0, 8, 4),
    PoolCase(0, 1, 9, 8, 4),
    PoolCase(boundaries="ascending"),
    PoolCase(boundaries="wild"),
    PoolCase(boundaries="wild", mask=True, lengths=True, batch=4),
    PoolCase(boundaries="single"),
    PoolCase(boundaries="own"),
    PoolCase(lengths=True, batch=4),
    PoolCase(mask=True, head_dim=64),
]


@pytest.mark.parametrize("case", grid(POOL_CASES, "statistic", STATISTICS), ids=label)
def test_block_pool_against_float64(backend: Backend, case: PoolCase) -> None:
    inputs = case.inputs()
    exact, exact_counts = reference.block_pool(*wide(inputs))
    plain, _ = reference.block_pool(*inputs)
    pooled, counts = backend.run("block_pool", *inputs)
    assert_bitwise_equal(counts, exact_counts)
    if case.statistic == "min_max":
        assert pooled.shape == exact.shape and torch.equal(pooled.double(), exact)
    else:
        check_accuracy(pooled, exact, plain, largest(exact))


def test_hidden_tokens_may_hold_anything(kernels: Backend) -> None:
    for statistic in STATISTICS:
        x, *options = PoolCase(mask=True, statistic=statistic).inputs()
        expected = kernels.run("block_pool", x, *options)
        x.transpose(1, 2)[~options[4]] = torch.nan
        assert_bitwise_equal(kernels.run("block_pool", x, *options), expected, statistic)


@dataclass(frozen=True)
class BlockCase:
    """Sizes and options of one call of block_score."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 1
    blocks: int = 21
    head_dim: int = 32
    rule: str = "dot"
    reduce: str = "none"
    dtype: torch.dtype = torch.float32
    pooled_dtype: torch.dtype = torch.float32
    counts: str = "none"
    scale: float | None = None

    def inputs(self) -> tuple:
        rng = generator(5)
        spread = (2,) if self.rule == "deviation" else ()
        q = torch.randn(
            self.batch, self.heads_q, self.queries, *spread, self.head_dim, generator=rng
        )
        shape = (self.batch, self.heads_kv, self.blocks, self.head_dim)
        statistics = [torch.randn(shape, generator=rng)]
        if self.rule != "dot":
            statistics.append(torch.rand(shape, generator=rng) * 2)
        if self.rule == "bounds":
            statistics[1] += statistics[0]
        counts = None
        if self.counts != "none":
            rows = 1 if self.counts == "shared" else self.batch
            counts = torch.randint(-1, 3, (rows, self.blocks), generator=rng).int()
            counts.clamp_(max=0 if self.counts == "nobody" else 9)
        return (
            q.to(torch.float32 if self.rule == "deviation" else self.dtype),
            torch.stack(statistics, 3).to(self.pooled_dtype),
            *(counts, self.rule, self.reduce, self.scale),
        )


BLOCK_CASES = [
    BlockCase(),
    BlockCase(1, 1, 1, 1, 1, 1),
    BlockCase(1, 6, 2, 5, 19, 80),
    BlockCase(1, 8, 1, 3, 70, 64, counts="own"),
    BlockCase(1, 3, 3, 40, 33, 24, counts="shared"),
    BlockCase(2, 4, 2, 2, 16, 256, counts="nobody"),
    BlockCase(1, 4, 1, 1, 300, 128, counts="own", scale=0.5),
    BlockCase(queries=0),
    BlockCase(blocks=0, queries=3),
    BlockCase(batch=0),
]


@pytest.mark.parametrize("rule", ["dot", "bounds", "deviation"])
@pytest.mark.parametrize("case", grid(BLOCK_CASES, "reduce", REDUCTIONS), ids=label)
def test_block_score_against_float64(backend: Backend, case: BlockCase, rule: str) -> None:
    # Queries of half precision come with blocks of either precision.
    pooled_dtype = torch.float32 if case.heads_kv == 1 else case.dtype
    case = replace(case, rule=rule, pooled_dtype=pooled_dtype)
    inputs = case.inputs()
    exact = reference.block_score(*wide(inputs))
    logits = reference.block_score(*wide((*inputs[:4], "none", inputs[5])))
    plain = reference.block_score(*inputs)
    check_accuracy(backend.run("block_score", *inputs), exact, plain, largest(logits))


def test_bounds_are_bounds(kernels: Backend) -> None:
    q, k, *_ = Case(keys=64, queries=1).inputs()
    pooled, counts = kernels.run("block_pool", k, 16, "min_max")
    bounds = kernels.run("block_score", q, pooled, counts, "bounds")
    scores = kernels.run("qk_score", q, k)
    blocks = scores.unflatten(2, (4, 16)).amax(3)
    assert (bounds[:, :, 0] >= blocks - 1e-5).all()


def test_one_token_blocks_score_as_tokens(kernels: Backend) -> None:
    q, k, *_ = Case().inputs()
    for rule, statistic in (("dot", "mean"), ("bounds", "min_max")):
        pooled, counts = kernels.run("block_pool", k, 1, statistic)
        scores = kernels.run("block_score", q, pooled, counts, rule)
        torch.testing.assert_close(scores[:, :, 0], kernels.run("qk_score", q, k))


BITWISE: list[tuple[str, Any]] = [
    *(("qk_score", Case(3, 6, 2, 2, 1100, 40, reduce=r, mask="keys")) for r in REDUCTIONS),
    *(("qk_score", Case(3, 6, 2, 1, 70, 40, reduce=r, dims="few")) for r in REDUCTIONS),
    ("qk_score", Case(3, 4, 1, 1, 700, 64, slots=True, lengths=True)),
    *(("block_pool", PoolCase(3, mask=True, statistic=s)) for s in STATISTICS),
    ("block_pool", PoolCase(3, 2, 700, 64, 64)),
    *(
        ("block_score", BlockCase(3, 6, 2, length, 50, 40, rule=rule, reduce=r, counts="own"))
        for rule in ("dot", "bounds", "deviation")
        for r in REDUCTIONS
        for length in (1, 9)
    ),
]
BATCHED = {"qk_score": (0, 1, 5, 6, 7), "block_pool": (0, 3, 4, 5), "block_score": (0, 1, 2)}


def case_label(value: Any) -> str:
    return value if isinstance(value, str) else label(value)


@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_batch_does_not_matter(kernels: Backend, op: str, case: Any) -> None:
    inputs = replace(case, dtype=torch.bfloat16).inputs()
    whole = flat(kernels.run(op, *inputs))
    for item in range(3):
        one = slice(item, item + 1)
        part = [
            t[one] if i in BATCHED[op] and isinstance(t, Tensor) and t.shape[0] == 3 else t
            for i, t in enumerate(inputs)
        ]
        alone = kernels.run(op, *part)
        assert_bitwise_equal(alone, [t[one] for t in whole], f"item {item}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_isa_and_threads_do_not_matter(
    on_every_cpu: Any, op: str, case: Any, dtype: torch.dtype
) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_one_result(on_every_cpu(lambda: getattr(tokred, op)(*inputs)))


def test_layout_does_not_matter(kernels: Backend) -> None:
    inputs = Case(keys=53, layout="tokens").inputs()
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in inputs]
    assert_bitwise_equal(kernels.run("qk_score", *inputs), kernels.run("qk_score", *copies))


def test_inputs_that_require_grad_are_refused(one_thread: None) -> None:
    q, k, *_ = Case().inputs()
    needing = k.clone().requires_grad_()
    pooled, _ = tokred.block_pool(k, 8)
    for call in (
        lambda: tokred.qk_score(q, needing),
        lambda: tokred.block_pool(needing, 8),
        lambda: tokred.block_score(q, pooled.requires_grad_()),
    ):
        with pytest.raises(ValueError, match="grad"):
            call()
