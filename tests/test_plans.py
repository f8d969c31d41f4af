"""Every launch plan of the CUDA kernels stays within the limits of the hardware."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

_C = pytest.importorskip("tokred._C", reason="tokred._C is not built for this Python")

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_THREADS = 1024
MAX_SHARED = 227 * 1024  # of a block, compute capability 9.0

BATCHES = (1, 7, 64, 4096, 1_000_000)
COUNTS = (1, 31, 64, 289, 577, 1024, 1025, 16384, 131072)
MAX_TOKENS = 2**33  # batch * tokens that could lie in a GPU's memory


def shapes(*axes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Combinations (batch, count, ...) of which a tensor could exist."""
    for shape in itertools.product(BATCHES, COUNTS, *axes):
        if shape[0] * shape[1] <= MAX_TOKENS:
            yield shape


def check(plans: dict, covered: dict[str, int]) -> None:
    """`covered` says how many blocks a plan must have at least."""
    assert covered.keys() <= plans.keys()
    for name, plan in plans.items():
        for size, limit in zip(plan["grid"], MAX_GRID, strict=True):
            assert 1 <= size <= limit, (name, plan)
        assert 32 <= plan["block"] <= MAX_THREADS and plan["block"] % 32 == 0, (name, plan)
        assert 0 <= plan["shared_bytes"] <= MAX_SHARED, (name, plan)
        assert plan["grid"][0] >= covered.get(name, 1), (name, plan)


@pytest.mark.parametrize("is_float", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("general", [False, True])
def test_match(is_float: bool, aligned: bool, general: bool) -> None:
    for batch, tokens in shapes():
        for rows in {1, (tokens + 1) // 2, tokens}:
            plans = _C.plan_match(batch, rows, tokens, is_float, aligned, general)
            # No block of 64 or 128 rows may be missing, unless blocks loop.
            blocks = min(batch * -(-rows // 128), 2**30)
            check(plans, {"match": blocks, "bipartite": batch})


def test_wide_tiles_only_where_blocks_abound() -> None:
    narrow, wide = (_C.plan_match(64, rows, 2 * rows)["match"] for rows in (289, 8192))
    assert narrow["grid"] == (64 * 5, 1, 1)
    assert wide["grid"] == (64 * 64, 1, 1)


def test_merge() -> None:
    for batch, tokens in shapes():
        for num_out in {1, (tokens + 1) // 2, tokens}:
            plans = _C.plan_merge(batch, tokens, num_out)
            assert ("list_members" in plans) == (tokens > 1024)
            check(plans, {"merge": batch, "unmerge": 1, "compose": 1})


@pytest.mark.parametrize("is_float", [False, True])
def test_attention(is_float: bool) -> None:
    heads = ((1, 1), (9, 3), (32, 1), (8, 8))
    dims = ((1, 1), (64, 64), (80, 80), (96, 32), (128, 128), (32, 256), (256, 256))
    for batch, queries, (heads_q, heads_kv), (dim, value_dim) in shapes(heads, dims):
        if batch * queries * heads_q > MAX_TOKENS:
            continue
        for keys in (1, 1370):
            plans = _C.plan_attention(
                batch, heads_q, heads_kv, queries, keys, dim, value_dim, is_float
            )
            check(plans, {name: batch * heads_kv for name in ("forward", "grad_query", "grad_key")})
