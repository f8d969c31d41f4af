"""The wgmma kernel, which only TOKRED_WGMMA=1 turns on, against the oracle of every other one."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cases import biased_attention as dense
from cases import block_sparse as blocks
from cases.attention import in_half_precision
from cases.backends import HERE, SIMT_LIBRARY, Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference

ROWS, KEYS = 64, 128  # of a warpgroup, of a tile


@pytest.fixture(params=[name for name in ("simt", "cuda") if name in HERE])
def kernels(kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The devices that have the kernel, with the kernel on."""
    if kernels.name == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma is for compute capability 9.0")
    monkeypatch.setenv("TOKRED_WGMMA", "1")
    return kernels


def products() -> int:
    """How many products of 64 rows the emulated tensor cores have made so far."""
    count = ctypes.CDLL(str(SIMT_LIBRARY)).tokred_simt_wgmma_count
    count.restype = ctypes.c_int64
    return count()


def run(backend: Backend, op: str, inputs: tuple) -> tuple[Tensor, Tensor, int]:
    """The results, and by how many tiles the warpgroups multiplied; -1 on other backends."""
    if backend.name != "simt":
        return *backend.run(op, *inputs), -1
    before = products()
    results = backend.run(op, *inputs)
    made, of_a_tile = products() - before, inputs[0].shape[3] // 16 + KEYS // 16
    assert made % of_a_tile == 0
    return *results, made // of_a_tile


def check(out: Tensor, lse: Tensor, inputs: tuple) -> None:
    """As the tests of biased_attention compare."""
    exact, exact_lse = reference.biased_attention(*widened(inputs))
    _, plain_lse = reference.biased_attention(*inputs)
    assert out.dtype == inputs[0].dtype and lse.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    largest = exact_lse.nan_to_num(0, 0, 0).abs().max().item() if lse.numel() else 0
    assert_as_accurate(lse, exact_lse, plain_lse, 8 * eps * (1 + largest), "lse")
    slack = torch.finfo(out.dtype).eps + 8 * eps * (1 + largest)
    assert_as_accurate(out, exact, in_half_precision(inputs), slack, "out")


SHAPES = [  # batch, query heads, key heads, queries, keys
    (1, 1, 1, 128, 128),
    (2, 4, 2, 49, 23),
    (1, 1, 1, 100, 700),
    (1, 6, 2, 70, 300),
    (1, 9, 3, 43, 513),
    (1, 2, 2, 300, 129),
    (1, 2, 1, 129, 1),
    (1, 2, 1, 65, 0),
]
CASES = [
    *(dense.Case(*shape, 64, 64, causal=causal) for shape in SHAPES for causal in (False, True)),
    *(dense.Case(*shape, 128, 128, causal=True, bias="full") for shape in SHAPES),
    *(
        dense.Case(1, 4, 2, 150, 290, 64, 64, bias=bias, mask=mask, causal=causal)
        for bias in ("none", "holes")
        for mask in dense.MASKS
        for causal in (False, True)
    ),
    *(dense.Case(1, 2, 1, 70, 290, 128, 128, mask=mask, bias="shared") for mask in dense.MASKS),
    *(dense.Case(1, 2, 1, 70, 290, 64, 64, magnitude=m, bias="full") for m in (1e-3, 30, 300)),
    *(dense.Case(1, 2, 1, 70, 290, 128, 128, scale=s, bias="full") for s in (0.0, 1.0, -0.3)),
]


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_dense(kernels: Backend, case: dense.Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    out, lse, tiles = run(kernels, "biased_attention", inputs)
    check(out, lse, inputs)
    # The rows of a key head in warpgroups, every one of which visits what its block does.
    group = case.heads_q // case.heads_kv
    starts = range(0, case.queries * group, ROWS)
    ends = [min((start // 128 + 1) * 128, case.queries * group) - 1 for start in starts]
    last = [case.keys - (case.queries - end // group if case.causal else 1) for end in ends]
    expected = sum(max(key + KEYS, 0) // KEYS for key in last) * case.batch * case.heads_kv
    assert tiles in (expected, -1) and (tiles or not case.keys)


BLOCK_CASES = [
    *(
        blocks.Case(*size, 1, 2, 1, 300, 700, dim, dim, mask_heads="query", density=0.25)
        for size in [(64, 64), (128, 128), (128, 32), (16, 16), (7, 5), (500, 500)]
        for dim in (64, 128)
    ),
    *(
        blocks.Case(*size, 1, 4, 2, 100, 290, 64, 64, causal=True, pairs=True, density=0.4)
        for size in [(64, 64), (16, 16), (1, 1), (7, 5), (64, 1)]
    ),
    *(blocks.Case(16, 8, 2, 4, 2, 60, 260, 64, 64, mask_heads=m) for m in ("shared", "group")),
    blocks.Case(64, 128, 1, 2, 1, 200, 5000, 64, 64, mask_heads="query", density=0.1),
    blocks.Case(16, 32, 1, 1, 1, 170, 33, 64, 64, causal=True),
    blocks.Case(4, 4, 1, 2, 1, 65, 0, 64, 64),
]


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=label)
def test_blocks(kernels: Backend, case: blocks.Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    out, lse, tiles = run(kernels, "block_sparse_attention", inputs)
    check(out, lse, blocks.as_mask(inputs))
    assert tiles != 0 or case.keys == 0


def test_only_visible_tiles_are_read(kernels: Backend) -> None:
    """Warpgroups skip tiles by query head; what hidden tiles hold does not matter."""
    case = blocks.Case(64, 128, 1, 2, 1, 250, 1200, 64, 64, torch.bfloat16, "query", 0.25)
    q, k, v, block_mask, *rest = case.inputs()
    block_mask[:, :, :, [0, 3, 7]] = False
    inputs = (q, k, v, block_mask, *rest)
    results = run(kernels, "block_sparse_attention", inputs)
    assert results[2] in (int(block_mask.sum()), -1)
    for first in (0, 3 * KEYS, 7 * KEYS):
        k[:, :, first : first + KEYS] = torch.nan
        v[:, :, first : first + KEYS] = torch.nan
    again = run(kernels, "block_sparse_attention", inputs)
    assert_bitwise_equal(again[:2], results[:2])


@pytest.mark.parametrize("dim", [64, 128])
def test_keys_that_do_not_exist_do_not_matter(kernels: Backend, dim: int) -> None:
    q, k, v, *_ = dense.Case(2, 2, 1, 70, 300, dim, dim, torch.bfloat16).inputs()
    exists = torch.rand(2, 1, 1, 300, generator=generator()) < 0.5
    arguments = (None, False, None, exists)
    results = run(kernels, "biased_attention", (q, k, v, *arguments))
    hidden = ~exists.reshape(2, 1, 300, 1)
    k, v = (t.masked_fill(hidden, torch.nan) for t in (k, v))
    again = run(kernels, "biased_attention", (q, k, v, *arguments))
    assert_bitwise_equal(again[:2], results[:2])
    assert results[2] != 0


def test_queries_without_keys_are_zero(kernels: Backend) -> None:
    inputs = blocks.Case(64, 64, 1, 4, 2, 300, 290, 64, 64, torch.float16, "query").inputs()
    inputs[3][:, :, 1:3] = False
    out, lse, tiles = run(kernels, "block_sparse_attention", inputs)
    assert out[:, :, 64:192].eq(0).all() and lse[:, :, 64:192].eq(-torch.inf).all()
    assert lse[:, :, :64].isfinite().any() and tiles != 0
    inputs[3].fill_(False)
    out, lse, tiles = run(kernels, "block_sparse_attention", inputs)
    assert out.eq(0).all() and lse.eq(-torch.inf).all() and tiles in (0, -1)


@pytest.mark.parametrize("columns", [1, 2])
def test_positions(kernels: Backend, columns: int) -> None:
    q, k, v, *_ = dense.Case(2, 4, 2, 100, 300, 64, 64, torch.bfloat16).inputs()
    rng = generator(3)
    query, key = (torch.randint(0, 9, (2, n, columns), generator=rng).int() for n in (100, 300))
    visible = (key[:, None] <= query[:, :, None]).all(-1)[:, None]
    rest = (None, False, None)
    out, lse, tiles = run(kernels, "biased_attention", (q, k, v, *rest, None, query, key))
    check(out, lse, (q, k, v, *rest, visible.contiguous()))
    assert tiles != 0


def test_views_equal_their_copies(kernels: Backend) -> None:
    """Views of one packed projection, as models make them; and keys that all heads share."""
    packed = torch.randn(2, 150, 3, 4, 64, generator=generator()).bfloat16()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    views = (q, k[:, :1].expand(-1, 4, -1, -1), v, None, True)
    copies = tuple(t.contiguous() if isinstance(t, Tensor) else t for t in views)
    first = run(kernels, "biased_attention", views)
    assert_bitwise_equal(run(kernels, "biased_attention", copies)[:2], first[:2])
    assert first[2] != 0


def test_batch_does_not_matter(kernels: Backend) -> None:
    case = blocks.Case(64, 64, 4, 4, 2, 150, 290, 64, 64, torch.bfloat16, "query", pairs=True)
    inputs = case.inputs()

    def part(index: slice | Tensor) -> list[Tensor]:
        some = (t[index] if isinstance(t, Tensor) else t for t in inputs)
        return list(run(kernels, "block_sparse_attention", tuple(some))[:2])

    whole = part(slice(None))
    order = torch.randperm(4, generator=generator())
    assert_bitwise_equal(part(order), [t[order] for t in whole], "permuted")
    for first, last in pairwise(range(5)):
        alone = part(slice(first, last))
        assert_bitwise_equal(alone, [t[first:last] for t in whole], "alone")


@pytest.mark.parametrize(
    ("wanted", "dims", "dtype", "offset"),
    [
        ("0", (64, 64), torch.bfloat16, 0),
        (None, (64, 64), torch.bfloat16, 0),
        ("1", (64, 64), torch.float32, 0),
        ("1", (96, 96), torch.bfloat16, 0),
        ("1", (64, 128), torch.bfloat16, 0),
        ("1", (64, 64), torch.bfloat16, 1),
    ],
)
def test_other_calls_take_the_other_kernel(
    kernels: Backend,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    dims: tuple[int, int],
    dtype: torch.dtype,
    offset: int,
) -> None:
    if wanted is None:
        monkeypatch.delenv("TOKRED_WGMMA")
    else:
        monkeypatch.setenv("TOKRED_WGMMA", wanted)
    q, k, v, *_ = dense.Case(1, 2, 1, 70, 40, *dims, dtype).inputs()
    k = torch.cat([k.new_zeros(offset), k.flatten()])[offset:].view_as(k)
    before = products() if kernels.name == "simt" else 0
    out, _ = kernels.run("biased_attention", q, k, v)
    assert kernels.name != "simt" or products() == before
    exact, _ = reference.biased_attention(*(t.double() for t in (q, k, v)))
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
