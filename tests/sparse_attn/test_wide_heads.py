"""Heads of more than 256 dimensions: results, gradients, and what CUDA refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cases.attention import (
    assert_close_to_exact,
    assert_gradients_are_accurate,
    assert_same_on_every_cpu,
    in_half_precision,
)
from cases.backends import Backend
from cases.biased_attention import Case
from cases.inputs import FLOATS, generator, widened
from cases.oracle import reference

MANY = Case(1, 2, 1, 37, 150, 576, 512, causal=True)
FEW = Case(2, 4, 2, 1, 300, 576, 320, bias="holes", mask="full")
NARROW = Case(1, 2, 2, 3, 20, 16, 257)


def dense(case: Case) -> tuple:
    return case.inputs()


def listed(case: Case, block_q: int = 1) -> tuple:
    q, k, v, bias, causal, scale, mask = case.inputs()
    shape = (case.batch, case.heads_kv, -(-case.queries // block_q), 40)
    indices = torch.randint(-2, case.keys + 2, shape, dtype=torch.int32, generator=generator(3))
    return (q, k, v, indices, scale, bias, causal, mask, block_q)


def shared(case: Case) -> tuple:
    return listed(case, case.queries)


def blocked(case: Case) -> tuple:
    q, k, v, bias, causal, scale, mask = case.inputs()
    blocks = torch.rand(1, 1, 3, 10, generator=generator(5)) < 0.6
    return (q, k, v, blocks, 16, 16, causal, scale, bias, mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("op", "make", "case"),
    [
        ("biased_attention", dense, MANY),
        ("biased_attention", dense, FEW),
        ("biased_attention", dense, NARROW),
        ("sparse_attention", listed, FEW),
        ("sparse_attention", shared, MANY),
    ],
)
def test_against_float64(
    backend: Backend, op: str, make: Any, case: Case, dtype: torch.dtype
) -> None:
    inputs = make(replace(case, dtype=dtype))
    results = backend.run(op, *inputs)
    exact, plain = (getattr(reference, op)(*x) for x in (widened(inputs), inputs))
    if dtype in FLOATS[1:] and op == "biased_attention":
        plain = (in_half_precision(inputs), plain[1])
    assert_close_to_exact(results, exact, plain)


def test_hidden_keys_add_nothing(kernels: Backend) -> None:
    """A key of NaN, which is seen by none, at the far end of a row."""
    q, k, v, _, causal, scale, mask = replace(FEW, bias="none").inputs()
    mask[..., 7] = False
    want = reference.biased_attention(q, k, v, None, causal, scale, mask)
    k[:, :, 7, 570], v[:, :, 7, 310] = torch.nan, torch.inf
    results = kernels.run("biased_attention", q, k, v, None, causal, scale, mask)
    assert_close_to_exact(results, want, want)


@pytest.mark.parametrize(
    ("op", "make"),
    [
        ("biased_attention", dense),
        ("sparse_attention", listed),
        ("block_sparse_attention", blocked),
    ],
)
def test_gradients_against_float64(kernels: Backend, op: str, make: Any) -> None:
    inputs = make(replace(MANY, mask="full", dtype=torch.float32))
    if kernels.name.startswith("cpu"):
        return assert_gradients_are_accurate(kernels, op, inputs)
    with pytest.raises((RuntimeError, ValueError), match="must be at most 256 on CUDA for"):
        assert_gradients_are_accurate(kernels, op, inputs)


def test_isa_and_threads_do_not_matter(on_every_cpu) -> None:
    case = replace(MANY, bias="full", dtype=torch.bfloat16)
    assert_same_on_every_cpu(on_every_cpu, "biased_attention", dense(case))
    assert_same_on_every_cpu(on_every_cpu, "block_sparse_attention", blocked(case))
