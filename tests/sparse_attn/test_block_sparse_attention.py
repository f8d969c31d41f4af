"""block_sparse_attention against its float64 oracle, and its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokred
from cases.attention import (
    assert_batch_does_not_matter,
    assert_gradients_are_accurate,
    assert_same_on_every_cpu,
    gradcheck,
    gradients,
    in_half_precision,
)
from cases.backends import Backend, move
from cases.block_sparse import Case, as_mask
from cases.compare import assert_as_accurate, assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference

SIZES = [(64, 64), (128, 128), (128, 32), (16, 16), (1, 1), (7, 5), (500, 500), (20, 100)]
CASES = [
    *(Case(*size, 1, 2, 1, 150, 200, mask_heads="query") for size in SIZES),
    *(Case(*size, causal=True, pairs=True) for size in [(16, 16), (1, 1), (7, 5), (64, 1)]),
    *(Case(*size, mask_heads="group") for size in [(16, 8), (8, 16), (5, 7)]),
    Case(16, 16, 1, 9, 3, 40, 70, 64, 64, mask_heads="query", causal=True),
    Case(16, 16, 1, 9, 3, 40, 70, 64, 48, pairs=True),
    Case(32, 32, 1, 2, 2, 33, 65, 80, 128, mask_heads="query"),
    Case(16, 32, 1, 1, 1, 70, 33, 8, 8, causal=True),
    Case(16, 16, 1, 2, 1, 20, 40, 136, 200, causal=True, pairs=True),
    Case(4, 4, 1, 1, 1, 1, 1, 1, 1, density=1.1),
    Case(4, 4, 1, 2, 1, 5, 0, 8, 8),
    Case(4, 4, 1, 2, 1, 0, 5, 8, 8),
    Case(4, 4, 0, 2, 1, 5, 5, 8, 8),
    *(Case(16, 16, mask_heads="query", pairs=True, dtype=dtype) for dtype in FLOATS[1:]),
    *(Case(7, 5, 1, causal=True, dtype=dtype) for dtype in FLOATS[1:]),
    *(Case(64, 64, 1, 2, 1, 150, 200, 64, 64, dtype=dtype) for dtype in FLOATS[1:]),
    Case(dtype=torch.float64, mask_heads="query", pairs=True),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    out, lse = backend.run("block_sparse_attention", *inputs)
    exact, exact_lse = reference.biased_attention(*as_mask(widened(inputs)))
    plain, plain_lse = reference.biased_attention(*as_mask(inputs))
    if case.dtype in FLOATS[1:]:
        plain = in_half_precision(as_mask(inputs))
    assert out.dtype == case.dtype and lse.dtype == plain_lse.dtype
    slack = 64 * torch.finfo(lse.dtype).eps
    assert_as_accurate(lse, exact_lse, plain_lse, slack, "lse")
    assert_as_accurate(out, exact, plain, torch.finfo(case.dtype).eps + slack, "out")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_against_float64(kernels: Backend, case: Case) -> None:
    assert_gradients_are_accurate(kernels, "block_sparse_attention", case.inputs())


@pytest.mark.parametrize("size", [(16, 16), (3, 3), (64, 64)], ids=str)
def test_rows_without_blocks_are_zero(backend: Backend, size: tuple[int, int]) -> None:
    inputs = Case(*size, queries=100, keys=70).inputs()
    inputs[3].fill_(True)[:, :, 0] = False
    out, lse = backend.run("block_sparse_attention", *inputs)
    assert out[:, :, : size[0]].eq(0).all() and lse[:, :, : size[0]].eq(-torch.inf).all()
    assert lse[:, :, size[0] :].isfinite().all()
    inputs[3].fill_(False)
    out, lse = backend.run("block_sparse_attention", *inputs)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    if backend.name != "reference":
        ones = torch.ones_like(out), torch.ones_like(lse)
        grads = gradients(backend, "block_sparse_attention", inputs, *ones)
        assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (16, 32), (7, 5), (1000, 1000)], ids=str)
def test_all_true_is_dense(kernels: Backend, size: tuple[int, int], causal: bool) -> None:
    """To the last bit; gradients too, where heads share their blocks."""
    inputs = Case(*size, 1, 4, 2, 150, 133, density=1.1, causal=causal).inputs()
    q, k, v, block_mask, block_q, block_k, *_ = inputs
    grad_out = torch.randn(q.shape, generator=generator())
    grad_lse = torch.randn(q.shape[:3], generator=generator())
    dense = kernels.run("biased_attention", q, k, v, None, causal)
    assert_bitwise_equal(kernels.run("block_sparse_attention", *inputs), dense)
    by_head = block_mask.repeat(1, 4, 1, 1)
    results = kernels.run("block_sparse_attention", q, k, v, by_head, block_q, block_k, causal)
    assert_bitwise_equal(results, dense, "by head")
    ops = torch.ops.tokred_simt if kernels.name == "simt" else torch.ops.tokred
    arguments = move([grad_out, grad_lse, q, k, v, None, *dense], kernels.device)
    rest = (causal, None, None, None, None)
    expected = move(ops.biased_attention_backward(*arguments, *rest), "cpu")
    actual = gradients(kernels, "block_sparse_attention", inputs, grad_out, grad_lse)
    assert_bitwise_equal(actual, expected[:3], "gradients")


def test_views_equal_their_copies(kernels: Backend) -> None:
    q, k, v, *_ = Case().inputs()
    mask = torch.rand(4, 8, 2, 3, generator=generator()).transpose(0, 3)[:, :, ::2] < 0.5
    mask = mask[:1, :, :, ::1].expand(2, -1, -1, -1)[:, :4]
    assert not mask.is_contiguous()
    blocks = (torch.Size((37, 53)), mask.shape)
    sizes = [-(-n // m) for n, m in zip(blocks[0], blocks[1][2:], strict=True)]
    first = kernels.run("block_sparse_attention", q, k, v, mask, *sizes)
    assert_bitwise_equal(
        first, kernels.run("block_sparse_attention", q, k, v, mask.contiguous(), *sizes)
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 1, 4, 2, 3, 5, 4, 3, pairs=False),
        Case(2, 3, 1, 4, 2, 5, 7, 4, 4, mask_heads="query", causal=True),
        Case(16, 16, 1, 2, 1, 18, 20, 2, 2, mask_heads="query"),
    ],
    ids=label,
)
def test_gradcheck(one_thread: None, case: Case) -> None:
    assert gradcheck("block_sparse_attention", replace(case, dtype=torch.float64).inputs())


@pytest.mark.parametrize("size", [(16, 16), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype, size: tuple[int, int]) -> None:
    case = Case(*size, batch=4, dtype=dtype, mask_heads="query", pairs=True, causal=True)
    assert_batch_does_not_matter(kernels, "block_sparse_attention", case.inputs())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(64, 64, 1, 2, 1, 300, 200, 32, 32, mask_heads="query"),
        Case(16, 40, 1, 4, 1, 133, 170, 20, 28, pairs=True, causal=True),
        Case(7, 5, 1, 2, 1, 133, 170, causal=True),
    ],
    ids=label,
)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_same_on_every_cpu(on_every_cpu, "block_sparse_attention", inputs)


def test_memory_is_linear(one_thread: None) -> None:
    """Forward and backward allocate what they return and little more, never L x N of anything."""
    length, dim = 2048, 16
    q, k, v = (torch.randn(1, 1, length, dim, requires_grad=True) for _ in range(3))
    block_mask = torch.rand(1, 1, length // 64, length // 64, generator=generator()) < 0.1
    with torch.profiler.profile(profile_memory=True) as profile:
        out, _ = tokred.block_sparse_attention(q, k, v, block_mask, 64, 64)
        out.backward(torch.ones_like(out))
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    returned = 4 * out.nbytes
    assert returned <= allocated < 4 * returned < length * length
