"""biased_attention against its float64 oracle, and its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.attention import (
    assert_batch_does_not_matter,
    assert_close_to_exact,
    assert_gradients_are_accurate,
    assert_same_on_every_cpu,
    gradcheck,
    in_half_precision,
)
from cases.backends import Backend
from cases.biased_attention import BIASES, MASKS, Case
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference

SIZES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(1, 9, 3, 33, 70, 64, 64, bias="full"),
    Case(2, 4, 1, 1, 129, 32, 48, bias="shared"),
    Case(1, 2, 2, 70, 33, 80, 80, causal=True),
    Case(1, 2, 1, 17, 65, 24, 8, causal=True, bias="holes"),
    Case(1, 2, 1, 5, 0, 8, 8),
    Case(1, 2, 1, 0, 5, 8, 8),
    Case(0, 2, 1, 4, 5, 8, 8),
    Case(1, 1, 1, 9, 40, 256, 256),
    Case(1, 1, 1, 40, 9, 7, 5),
]
LARGE = [
    Case(1, 3, 3, 197, 197, 64, 64, bias="full"),
    Case(1, 1, 1, 300, 1000, 64, 64, causal=True),
]
CASES = [
    *(replace(case, dtype=dtype) for case in [*SIZES, *LARGE] for dtype in FLOATS),
    *(replace(case, dtype=torch.float64) for case in SIZES[:6]),
    *(
        Case(bias=bias, mask=mask, causal=causal)
        for bias in BIASES
        for mask in MASKS
        for causal in (False, True)
    ),
    *(Case(bias="holes", mask=m, causal=True, dtype=d) for m in MASKS for d in FLOATS[1:]),
    *(Case(magnitude=m, bias="full", dtype=d) for m in (1e-3, 30, 300) for d in FLOATS),
    *(Case(scale=s, bias="full") for s in (0.0, 1.0, -0.3)),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    results = backend.run("biased_attention", *inputs)
    exact = reference.biased_attention(*widened(inputs))
    plain, plain_lse = reference.biased_attention(*inputs)
    if case.dtype in FLOATS[1:]:
        plain = in_half_precision(inputs)
    assert_close_to_exact(results, exact, (plain, plain_lse))


def test_sizes_as_bias_are_repeated_keys(backend: Backend) -> None:
    """ToMe's proportional attention."""
    q, k, v, *_ = Case(keys=9).inputs()
    size = torch.randint(1, 5, (9,), generator=generator())
    repeated = [t.repeat_interleave(size, dim=2) for t in (k, v)]
    bias = size.float().log()[None, None]
    weighted = backend.run("biased_attention", q, k, v, bias)
    for a, b in zip(weighted, backend.run("biased_attention", q, *repeated), strict=True):
        torch.testing.assert_close(a, b)


def test_equals_torch_sdpa(backend: Backend) -> None:
    q, k, v, bias, *_ = Case(bias="full").inputs()
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    bias = bias.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias[:, :, None])
    torch.testing.assert_close(backend.run("biased_attention", q, k, v, bias)[0], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_without_keys_are_zero(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v, *_ = Case(queries=30, keys=20, dtype=dtype).inputs()
    out, lse = backend.run("biased_attention", q, k, v, causal=True)
    assert out[:, :, :10].eq(0).all() and lse[:, :, :10].eq(-torch.inf).all()
    assert lse[:, :, 10:].isfinite().all()
    hidden = torch.full((1, 1, 20), -torch.inf)
    out, lse = backend.run("biased_attention", q, k, v, hidden)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


def test_views_equal_their_copies(kernels: Backend) -> None:
    """One packed projection, its heads moved, as models hand it over; a broadcast mask and bias."""
    rng = generator(4)
    packed = torch.randn(2, 37, 3, 4, 16, generator=rng).permute(2, 0, 3, 1, 4)
    mask = (torch.rand(2, 74, generator=rng) < 0.8)[:, ::2][:, None, None]
    bias = torch.rand(37, 2, generator=rng).t()[:, None]
    views = (*packed.unbind(0), bias, True, None, mask)
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in views]
    first = kernels.run("biased_attention", *views)
    assert_bitwise_equal(first, kernels.run("biased_attention", *copies))
    wide = (bias.expand(2, 4, 37), True, None, mask.expand(2, 4, 37, 37))
    assert_bitwise_equal(first, kernels.run("biased_attention", *views[:3], *wide), "expanded")


def test_two_dimensional_bias_and_mask() -> None:
    q, k, v, *_ = Case().inputs()
    bias, mask = torch.rand(2, 23), torch.rand(2, 23) < 0.5
    short = tokred.biased_attention(q, k, v, bias, mask=mask)
    full = tokred.biased_attention(q, k, v, bias[:, None], mask=mask[:, None, None])
    assert_bitwise_equal(short, full)


GRADIENT_CASES = [
    Case(),
    Case(1, 6, 2, 33, 40, 32, 24, bias="full"),
    Case(bias="shared", causal=True),
    Case(bias="holes", mask="full", causal=True),
    Case(queries=30, keys=20, causal=True, mask="keys", bias="full"),
    Case(1, 1, 1, 1, 1, 1, 1, bias="full"),
    Case(1, 2, 1, 70, 9, 64, 64, mask="pairs"),
    Case(1, 2, 1, 5, 0, 8, 8),
    Case(magnitude=20, bias="full"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=label)
def test_gradients_against_float64(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_gradients_are_accurate(kernels, "biased_attention", inputs, case.magnitude)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 3, 5, 4, 3, bias="full"),
        Case(2, 2, 1, 3, 5, 4, 4, bias="shared", causal=True),
        Case(1, 2, 2, 5, 3, 4, 4, mask="full", causal=True),
        Case(1, 2, 1, 3, 6, 4, 4, bias="holes", mask="keys"),
    ],
    ids=label,
)
def test_gradcheck(one_thread: None, case: Case) -> None:
    assert gradcheck("biased_attention", replace(case, dtype=torch.float64).inputs())


def test_only_what_requires_grad_gets_one() -> None:
    q, k, v, bias, *_ = Case(bias="full").inputs()
    out, _ = tokred.biased_attention(q, k.requires_grad_(), v, bias)
    out.sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None and bias.grad is None
    with torch.no_grad():
        assert not tokred.biased_attention(q, k, v)[0].requires_grad


def test_transposed_gradients_are_accepted() -> None:
    q, k, v, *_ = Case().inputs()
    q.requires_grad_()
    out, lse = tokred.biased_attention(q, k, v)
    weight = torch.randn(2, 19, 4 * 16)
    (out.transpose(1, 2).flatten(2) * weight).sum().backward(retain_graph=True)
    grad = weight.unflatten(2, (4, 16)).transpose(1, 2).contiguous()
    expected = torch.autograd.grad(tokred.biased_attention(q, k, v)[0], q, grad)[0]
    torch.testing.assert_close(q.grad, expected)
    lse.sum().backward()  # an expanded gradient, with stride 0 everywhere


def test_autocast_casts_all_but_the_bias() -> None:
    q, k, v, bias, *_ = Case(bias="full").inputs()
    q.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = tokred.biased_attention(q, k, v, bias)
        half = tokred.biased_attention(*(t.bfloat16() for t in (q, k, v)), bias)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert_bitwise_equal((out, lse), half)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype) -> None:
    case = Case(4, 4, 2, 21, 50, 32, 32, dtype, bias="full", mask="keys", causal=True)
    assert_batch_does_not_matter(kernels, "biased_attention", case.inputs())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 70, 133, 64, 64, bias="full", mask="pairs"),
        Case(1, 2, 1, 33, 40, 20, 28, causal=True),
        Case(1, 3, 1, 70, 230, 40, 24, bias="holes", mask="keys"),
    ],
    ids=label,
)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_same_on_every_cpu(on_every_cpu, "biased_attention", inputs)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 0, 5), (2, 3, 0), (0, 3, 5)])
def test_gradients_of_nothing(batch: int, queries: int, keys: int) -> None:
    """A sum hands back a gradient without strides, and a bias may have no elements."""
    q, k, v = (torch.randn(batch, 2, n, 8, requires_grad=True) for n in (queries, keys, keys))
    key_bias = torch.zeros(batch, 2, keys, requires_grad=True)
    tokred.biased_attention(q, k, v, key_bias)[0].sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v, key_bias))
