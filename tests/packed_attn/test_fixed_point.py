"""The CPU multiplies half-precision queries and codes in 16-bit fixed point: errors and limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import generator
from cases.oracle import reference
from cases.packed import as_records, fixed_point_slack, pack, packing
from tokred import PackedKV

HALVES = (torch.float16, torch.bfloat16)


def half_queries(dtype: torch.dtype, head_dim: int, smallest: float) -> Tensor:
    """Two heads of magnitudes between `smallest` and 1, of any sign."""
    rng = generator(1)
    q = smallest + (1 - smallest) * torch.rand(1, 2, 1, head_dim, generator=rng)
    q = q.clamp(max=1).to(dtype)
    return q * torch.randint(0, 2, q.shape, generator=rng).mul(2).sub(1).to(dtype)


def side(text: str, tokens: int, head_dim: int, seed: int = 2) -> PackedKV:
    return pack(torch.randn(1, 1, tokens, head_dim, generator=generator(seed)), packing(text))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("dtype", "smallest"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-4)])
def test_a_query_of_few_binades_is_exact(
    kernels: Backend, bits: int, dtype: torch.dtype, smallest: float
) -> None:
    k = side(f"{bits} channel 64", 50, 128)
    q = half_queries(dtype, 128, smallest)
    actual, expected = (kernels.run("packed_attention", x, k, k)[1] for x in (q, q.float()))
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    scores = (kernels.run("packed_qk_score", x, k, scale=1.0) for x in (q, q.float()))
    torch.testing.assert_close(*scores, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("outlier", [1.0, 100.0])
@pytest.mark.parametrize(
    "text",
    [
        "1 channel 32",
        "2 channel 64 symmetric",
        "4 channel 32",
        "4 channel 128 asymmetric rotated",
        "8 channel 64 zero_point",
        "4 token 32",
        "2 token 48 symmetric rotated",
    ],
)
def test_logits_are_off_by_little(
    kernels: Backend, text: str, outlier: float, dtype: torch.dtype
) -> None:
    k = side(text, 96, 128)
    q = torch.randn(1, 2, 1, 128, generator=generator(3))
    q[..., 5] *= outlier
    q = q.to(dtype)
    slack = max(fixed_point_slack(kernels, q, k, None), 1e-5 * outlier)
    actual, expected = (kernels.run("packed_qk_score", x, k) for x in (q, q.float()))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=slack)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_overflows(kernels: Backend, dtype: torch.dtype) -> None:
    """The largest codes and queries in the widest group, and weights that are all the same."""
    top = torch.ones(1, 1, 130, 256)
    top[..., 0::256] = 0.0
    k = pack(top, packing("8 channel 256"))
    q = torch.ones(1, 2, 1, 256, dtype=dtype)
    q[:, 1] = -torch.finfo(dtype).max / 2**110 if dtype == torch.bfloat16 else -60000.0
    out, lse = kernels.run("packed_attention", q, k, k, scale=1.0)
    expected, expected_lse = reference.packed_attention(q.double(), k, k, scale=1.0)
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("text", ["4 channel 64", "4 token 32"])
def test_one_token_among_many_of_little_weight(
    kernels: Backend, text: str, dtype: torch.dtype
) -> None:
    """Weights far below a step are lost; the others must not notice."""
    k, v = side("4 channel 64", 64, 128), side(text, 64, 128, seed=5)
    q = torch.randn(1, 2, 1, 128, generator=generator(4)).to(dtype)
    bias = torch.zeros(1, 1, 64)
    for gap in (5.0, 10.4, 11.5, 80.0):
        bias[..., 1:] = -gap
        out, _ = kernels.run("packed_attention", q, k, v, key_bias=bias)
        expected, _ = reference.packed_attention(q.double(), k, v, key_bias=bias)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected.double(), rtol=2 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_spoils_itself_only(
    kernels: Backend, number: float, dtype: torch.dtype
) -> None:
    k = side("4 channel 64", 70, 128)
    q = torch.randn(1, 4, 1, 128, generator=generator(6)).to(dtype)
    clean = kernels.run("packed_attention", q, k, k)
    q[0, 2, 0, 9] = number
    out, lse = kernels.run("packed_attention", q, k, k)
    others = torch.tensor([0, 1, 3])
    assert_bitwise_equal([out[:, others], lse[:, others]], [t[:, others] for t in clean])
    assert out[:, 2].isnan().all() and not lse[:, 2].isfinite().any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("smallest", [0.0, 1e-40, 6e-8])
def test_tiny_queries(kernels: Backend, smallest: float, dtype: torch.dtype) -> None:
    """Zeros and subnormal numbers: every token counts the same."""
    k = side("4 channel 64", 33, 128)
    q = torch.full((1, 2, 1, 128), smallest).to(dtype)
    out, lse = kernels.run("packed_attention", q, k, k)
    expected, expected_lse = reference.packed_attention(q.double(), k, k)
    torch.testing.assert_close(lse.double(), expected_lse.double(), rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected.double(), rtol=eps, atol=eps)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "text",
    [
        *(f"{bits} channel {group}" for bits in (1, 2, 4, 8) for group in (32, 64, 128)),
        *(f"{bits} token {group}" for bits in (1, 2, 4, 8) for group in (24, 64)),
        "8 channel 64 zero_point",
        "4 channel 64 symmetric rotated",
    ],
)
def test_the_same_bits_however_numbers_meet_codes(
    on_every_cpu: Callable, text: str, rows: int
) -> None:
    """As pairs or bytes, in whole blocks, in part of one, and from lists; at the extremes too."""
    k = side(text, 192, 128)
    q = torch.randn(1, rows, 1, 128, generator=generator(8)).to(torch.bfloat16)
    q[:, -1] = 1.0
    q[:, -1, :, ::2] = -1.0
    lists = torch.randint(0, 192, (1, 1, 1, 90), dtype=torch.int32, generator=generator(9))

    def run() -> list[Tensor]:
        listed = tokred.packed_attention(q, k, k, indices=lists)
        return [*tokred.packed_attention(q, k, k), *listed, tokred.packed_qk_score(q, k)]

    assert_one_result(on_every_cpu(run))
    top = replace(k, codes=torch.full_like(k.codes, 255))
    assert_one_result(on_every_cpu(lambda: tokred.packed_attention(q, top, top)))


def test_exact_sums_are_those_of_all_tokens_alone(kernels: Backend) -> None:
    """Blocks that are runs of tokens, and the same tokens from a list: one result."""
    k, v = side("4 channel 64", 200, 128), side("8 channel 32", 200, 128, seed=5)
    q = torch.randn(1, 4, 1, 128, generator=generator(10)).to(torch.float16)
    every = torch.arange(200, dtype=torch.int32)[None, None, None]
    whole = kernels.run("packed_attention", q, k, v)
    assert_bitwise_equal(kernels.run("packed_attention", q, k, v, indices=every), whole)
    records = kernels.run("packed_attention", q, *as_records(k, v))
    assert_bitwise_equal(records, whole)
