"""packed_attention to listed tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases.backends import Backend
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label
from cases.oracle import reference
from cases.packed import (
    CACHE,
    CHANNEL,
    PAGES,
    RING,
    Case,
    as_records,
    assert_alone_as_in_a_batch,
    assert_same_on_every_cpu,
    check,
    spoil,
)

LISTS = ("head", "kv", "one")
PLAIN = [
    replace(case, lists=lists, each_query=each_query, queries=queries)
    for case in (CHANNEL, Case(group=3, bias="full", mask="padding"))
    for lists in LISTS
    for each_query in (False, True)
    for queries in (1, 5)
]
CACHES = [
    replace(case, lists=lists, each_query=each_query, listed=60, queries=3, causal=True)
    for case in (CACHE, RING, PAGES, replace(RING, lengths=True, batch=7))
    for lists, each_query in (("head", False), ("kv", True), ("one", False))
]
SIZES = [
    replace(CHANNEL, lists="kv", listed=0),
    replace(CHANNEL, lists="kv", listed=1),
    replace(CHANNEL, lists="kv", listed=9, tokens=0),
    replace(CHANNEL, lists="kv", listed=9, tokens=1),
    replace(CHANNEL, lists="one", queries=0, listed=5),
    replace(CHANNEL, lists="one", batch=0, listed=5),
    replace(CHANNEL, lists="kv", heads=1, group=4, batch=1, tokens=4099, listed=2500),
    Case(1, 3, 3, 1, 96, 128, 128, v="4 channel 128", lists="kv", listed=80),
    Case(1, 3, 3, 2, 96, 80, 80, "4 token 32", "4 channel 80", lists="kv"),
    Case(1, 1, 2, 4, 48, 256, 256, "3 token 16", "3 channel 64", lists="head"),
    Case(1, 1, 8, 33, 128, k="2 token 32", v="2 channel 32", lists="kv", causal=True),
    Case(window_k=16, window_v=32, lists="head", listed=40),
    Case(k="4 channel 32 symmetric rotated", v="3 token 16 symmetric rotated", lists="head"),
    Case(k="8 channel 64 fp8", v="8 channel 32 fp8", lists="one", queries=4, mask="full"),
    Case(k="3 channel 64 codebook rotated", v="2 channel 32 codebook", lists="kv", queries=2),
    Case(k="1 token 8 zero_point", v="1 channel 16", lists="kv", queries=4, each_query=True),
    Case(lists="kv", mask="full", bias="holes", queries=4, each_query=True, causal=True),
    Case(lists="head", mask="heads", bias="tokens", queries=4),
]
CASES = [replace(c, dtype=FLOATS[i % 3]) for i, c in enumerate([*PLAIN, *CACHES])]
CASES += [replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_lists_against_float64(backend: Backend, case: Case) -> None:
    check(backend, case.inputs())


@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize("case", [Case(queries=3), RING, PAGES], ids=["plain", "ring", "pages"])
def test_all_tokens_equal_no_list(backend: Backend, case: Case, lists: str) -> None:
    case = replace(case, lists=lists, listed=case.tokens, causal=True, bias="full")
    inputs = list(case.inputs())
    every = torch.arange(case.tokens, dtype=torch.int32).expand(inputs[6].shape).contiguous()
    inputs[6] = None
    dense = backend.run("packed_attention", *inputs)
    inputs[6] = every
    for a, b in zip(backend.run("packed_attention", *inputs), dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 5])
def test_a_list_is_a_gather(backend: Backend, queries: int) -> None:
    """Chosen tokens of every key head, against attention on these alone."""
    q, k, v, *_ = Case(queries=queries, k="4 channel 32").inputs()
    chosen = torch.stack([torch.randperm(80, generator=generator(i))[:30] for i in range(4)])
    indices = chosen.view(2, 2, 1, 30).int()
    rows = []
    for side in (k, v):
        x = reference.kv_unpack(side)
        rows.append(x.gather(2, chosen.view(2, 2, 30, 1).expand(-1, -1, -1, 64)))
    expected = reference.biased_attention(q, *rows)
    actual = backend.run("packed_attention", q, k, v, indices=indices)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_token_listed_twice_counts_twice(backend: Backend) -> None:
    q, k, v, *_ = Case(queries=2).inputs()
    double = torch.zeros(1, 1, 80)
    double[..., 7] = torch.tensor(2.0).log()
    twice, once = (
        torch.tensor(tokens, dtype=torch.int32).expand(2, 1, 1, -1)
        for tokens in ([3, 7, 70, 7], [3, 7, 70])
    )
    actual = backend.run("packed_attention", q, k, v, indices=twice)
    expected = backend.run("packed_attention", q, k, v, indices=once, key_bias=double)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("queries", [1, 6])
def test_lists_of_nothing(backend: Backend, queries: int, dtype: torch.dtype) -> None:
    case = replace(CHANNEL, queries=queries, dtype=dtype, lists="kv")
    q, k, v, *_, = case.inputs()  # fmt: skip
    indices = torch.zeros(2, 2, 1, 9, dtype=torch.int32)
    nothing = torch.zeros(2, 70, dtype=torch.bool)
    for options in (
        {"indices": indices - 1},
        {"indices": indices + 70},
        {"indices": indices[..., :0]},
        {"indices": indices, "mask": nothing},
        {"indices": indices + 12, "length": 12},
    ):
        out, lse = backend.run("packed_attention", q, k, v, **options)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()


@pytest.mark.parametrize("each_query", [False, True])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_tokens_in_no_list_may_hold_anything(
    kernels: Backend, number: float, each_query: bool
) -> None:
    case = Case(tokens=96, window_k=16, window_v=32, queries=3, lists="head", each_query=each_query)
    q, k, v, residual_k, residual_v, scale, indices, *_ = case.inputs()
    lost = (torch.arange(96) // 16 % 3 == 1)[None].expand(2, -1)
    indices = torch.where(indices // 16 % 3 == 1, -1, indices)
    clean = kernels.run("packed_attention", q, k, v, residual_k, residual_v, scale, indices=indices)
    k, v = (spoil(side, lost[:, : side.num_tokens], number) for side in (k, v))
    residuals = [
        rows.masked_fill(lost[:, None, -rows.shape[2] :, None], number)
        for rows in (residual_k, residual_v)
    ]
    spoiled = kernels.run("packed_attention", q, k, v, *residuals, scale, indices=indices)
    assert clean[0].isfinite().all()
    assert_bitwise_equal(spoiled, clean)


def test_padding_does_not_matter(kernels: Backend) -> None:
    """Entries of -1 behind the others change nothing, and lists may be views."""
    q, k, v, *_ = Case(queries=3, group=4).inputs()
    indices = torch.randint(0, 80, (2, 2, 3, 24), dtype=torch.int32, generator=generator(5))
    first = kernels.run("packed_attention", q, k, v, indices=indices)
    padded = torch.full((2, 4, 6, 48), -1, dtype=torch.int32)
    padded[:, ::2, ::2, :24] = indices
    view = padded[:, ::2, ::2]
    assert_bitwise_equal(kernels.run("packed_attention", q, k, v, indices=view), first)


def test_lists_in_records(kernels: Backend) -> None:
    case = Case(2, 2, 3, 1, 85, 128, 128, "4 channel 64", "4 channel 64", lists="kv")
    q, k, v, *_, = case.inputs()  # fmt: skip
    indices = case.inputs()[6]
    expected = kernels.run("packed_attention", q, k, v, indices=indices)
    actual = kernels.run("packed_attention", q, *as_records(k, v), indices=indices)
    assert_bitwise_equal(actual, expected)


BITWISE = [
    replace(CHANNEL, batch=3, tokens=1100, lists=lists, listed=1030, head_dim=16, value_dim=32)
    for lists in LISTS
]
BITWISE = [replace(case, k="4 channel 16") for case in BITWISE]
BITWISE += [
    replace(PAGES, lists="kv", lengths=True, listed=50, group=4),
    Case(3, 2, 2, 9, lists="head", each_query=True, causal=True, window_k=16, window_v=16),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_batch_does_not_matter(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_alone_as_in_a_batch(kernels, "packed_attention", inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", BITWISE, ids=label)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_same_on_every_cpu(on_every_cpu, "packed_attention", inputs)
