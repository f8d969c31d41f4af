"""block_pool and block_score against their float64 oracles, and bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference
from cases.packed import assert_same_on_every_cpu
from cases.score import (
    REDUCTIONS,
    assert_alone_as_in_a_batch,
    case_label,
    check_accuracy,
    grid,
)


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
    exact, exact_counts = reference.block_pool(*widened(inputs))
    plain, _ = reference.block_pool(*inputs)
    pooled, counts = backend.run("block_pool", *inputs)
    assert_bitwise_equal(counts, exact_counts)
    if case.statistic == "min_max":
        assert pooled.shape == exact.shape and torch.equal(pooled.double(), exact)
    else:
        check_accuracy(pooled, exact, plain, exact)


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
            counts.clamp_(max=0 if self.counts == "nothing" else 9)
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
    BlockCase(2, 4, 2, 2, 16, 256, counts="nothing"),
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
    exact = reference.block_score(*widened(inputs))
    logits = reference.block_score(*widened((*inputs[:4], "none", inputs[5])))
    plain = reference.block_score(*inputs)
    check_accuracy(backend.run("block_score", *inputs), exact, plain, logits)


def queries_and_keys(keys: int) -> tuple[Tensor, Tensor]:
    rng = generator(3)
    return tuple(torch.randn(shape, generator=rng) for shape in ((2, 4, 1, 64), (2, 2, keys, 64)))


def test_bounds_are_bounds(kernels: Backend) -> None:
    q, k = queries_and_keys(64)
    pooled, counts = kernels.run("block_pool", k, 16, "min_max")
    bounds = kernels.run("block_score", q, pooled, counts, "bounds")
    scores = kernels.run("qk_score", q, k)
    blocks = scores.unflatten(2, (4, 16)).amax(3)
    assert (bounds[:, :, 0] >= blocks - 1e-5).all()


def test_one_token_blocks_score_as_tokens(kernels: Backend) -> None:
    q, k = queries_and_keys(37)
    for rule, statistic in (("dot", "mean"), ("bounds", "min_max")):
        pooled, counts = kernels.run("block_pool", k, 1, statistic)
        scores = kernels.run("block_score", q, pooled, counts, rule)
        torch.testing.assert_close(scores[:, :, 0], kernels.run("qk_score", q, k))


BITWISE: list[tuple[str, Any]] = [
    *(("block_pool", PoolCase(3, mask=True, statistic=s)) for s in STATISTICS),
    ("block_pool", PoolCase(3, 2, 700, 64, 64)),
    *(
        ("block_score", BlockCase(3, 6, 2, length, 50, 40, rule=rule, reduce=r, counts="own"))
        for rule in ("dot", "bounds", "deviation")
        for r in REDUCTIONS
        for length in (1, 9)
    ),
]


@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_batch_does_not_matter(kernels: Backend, op: str, case: Any) -> None:
    assert_alone_as_in_a_batch(kernels, op, replace(case, dtype=torch.bfloat16).inputs())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op, case", BITWISE, ids=case_label)
def test_isa_and_threads_do_not_matter(
    on_every_cpu: Any, op: str, case: Any, dtype: torch.dtype
) -> None:
    assert_same_on_every_cpu(on_every_cpu, op, replace(case, dtype=dtype).inputs())
