"""The softcap of logits in the ops of sparse_attn: results, gradients, equal bits, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

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
from cases.bad_input import names_the_argument
from cases.biased_attention import Case
from cases.compare import assert_bitwise_equal
from cases.inputs import FLOATS, generator, widened
from cases.oracle import reference

# Caps that bend the logits, leave them nearly as they are, and flatten most of them.
BENT, STRAIGHT, FLAT = 2.0, 50.0, 0.3


def dense(case: Case, softcap: float) -> tuple:
    return (*case.inputs(), None, None, softcap)


def listed(case: Case, softcap: float, block_q: int = 1, *rope: Any) -> tuple:
    q, k, v, bias, causal, scale, mask = case.inputs()
    shape = (case.batch, case.heads_kv, -(-case.queries // block_q), 24)
    indices = torch.randint(-2, case.keys + 2, shape, dtype=torch.int32, generator=generator(3))
    return (q, k, v, indices, scale, bias, causal, mask, block_q, *(rope or (None, None)), softcap)


def shared(case: Case, softcap: float) -> tuple:
    return listed(case, softcap, case.queries)


def rotated(case: Case, softcap: float) -> tuple:
    angles = torch.rand(2, 24, case.head_dim // 2, generator=generator(4))
    return listed(case, softcap, 1, *angles.unbind(0))


def blocked(case: Case, softcap: float) -> tuple:
    q, k, v, bias, causal, scale, mask = case.inputs()
    shape = (1, case.heads_q, -(-case.queries // 16), -(-case.keys // 16))
    blocks = torch.rand(shape, generator=generator(5)) < 0.6
    return (q, k, v, blocks, 16, 16, causal, scale, bias, mask, softcap)


MANY, FEW = Case(1, 4, 2, 37, 70, 32, 24), Case(2, 4, 2, 2, 133, 40, 24)
HOLES = Case(1, 4, 2, 37, 70, 32, 24, bias="holes", mask="full", causal=True)
CALLS = [
    *(
        ("biased_attention", dense, replace(case, dtype=dtype, magnitude=3), BENT)
        for case in (MANY, FEW, HOLES)
        for dtype in FLOATS
    ),
    ("biased_attention", dense, replace(MANY, dtype=torch.float64), BENT),
    ("biased_attention", dense, MANY, STRAIGHT),
    ("biased_attention", dense, replace(FEW, magnitude=30, bias="full"), FLAT),
    ("biased_attention", dense, Case(1, 2, 1, 20, 40, 256, 256, scale=-0.5), BENT),
    ("sparse_attention", listed, replace(FEW, bias="holes", magnitude=3), BENT),
    ("sparse_attention", shared, replace(MANY, causal=True, dtype=torch.float16), BENT),
    ("sparse_attention", rotated, replace(FEW, magnitude=3), BENT),
    ("block_sparse_attention", blocked, replace(MANY, bias="full", magnitude=3), BENT),
]


@pytest.mark.parametrize(("op", "make", "case", "softcap"), CALLS)
def test_against_float64(backend: Backend, op: str, make: Any, case: Case, softcap: float) -> None:
    inputs = make(case, softcap)
    results = backend.run(op, *inputs)
    exact, plain = (getattr(reference, op)(*x) for x in (widened(inputs), inputs))
    if case.dtype in FLOATS[1:] and op == "biased_attention":
        plain = (in_half_precision(inputs), plain[1])
    assert_close_to_exact(results, exact, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("op", "make", "case"),
    [
        ("biased_attention", dense, replace(MANY, bias="full")),
        ("biased_attention", dense, HOLES),
        ("biased_attention", dense, Case(1, 2, 1, 20, 30, 128, 128)),
        ("sparse_attention", listed, replace(FEW, bias="full", queries=5)),
        ("block_sparse_attention", blocked, replace(MANY, bias="full")),
    ],
)
def test_gradients_against_float64(
    kernels: Backend, op: str, make: Any, case: Case, dtype: torch.dtype
) -> None:
    inputs = make(replace(case, dtype=dtype, magnitude=3), BENT)
    assert_gradients_are_accurate(kernels, op, inputs, 3)


@pytest.mark.parametrize(
    ("op", "make"),
    [
        ("biased_attention", dense),
        ("sparse_attention", listed),
        ("block_sparse_attention", blocked),
    ],
)
def test_gradcheck(one_thread: None, op: str, make: Any) -> None:
    case = Case(1, 4, 2, 3, 5, 4, 3, torch.float64, bias="full", mask="full", causal=True)
    assert gradcheck(op, make(case, BENT))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, dtype: torch.dtype) -> None:
    case = replace(HOLES, dtype=dtype, magnitude=5)
    for op, inputs in (
        ("biased_attention", dense(case, BENT)),
        ("sparse_attention", listed(case, BENT)),
    ):
        assert_same_on_every_cpu(on_every_cpu, op, inputs)


def test_batch_does_not_matter(kernels: Backend) -> None:
    case = Case(4, 4, 2, 21, 50, 32, 32, bias="full", mask="keys", causal=True)
    assert_batch_does_not_matter(kernels, "biased_attention", dense(case, BENT))


@pytest.mark.parametrize("queries", [2, 40])
def test_hidden_keys_add_nothing(kernels: Backend, queries: int) -> None:
    """Not even to the gradients, where tanh has no slope."""
    case = Case(1, 2, 1, queries, 60, 16, 16, mask="full")
    q, k, v, _, causal, scale, mask = case.inputs()
    mask[..., 7] = False
    spoilt = k.clone()
    spoilt[:, :, 7] = torch.nan
    for key in (k, spoilt):
        arguments = (q, key, v, None, causal, scale, mask, None, None, BENT)
        results = kernels.run("biased_attention", *arguments)
        assert_close_to_exact(
            results,
            *2 * (reference.biased_attention(q, k, v, None, causal, scale, mask, softcap=BENT),),
        )
        if kernels.name.startswith("cpu"):
            q.requires_grad_().grad = None
            tokred.biased_attention(*arguments)[0].sum().backward()
            assert q.grad.isfinite().all()
            q = q.detach()


def test_a_large_softcap_changes_nothing_much() -> None:
    inputs = MANY.inputs()
    plain, capped = (tokred.biased_attention(*inputs, softcap=cap) for cap in (None, 1e6))
    for a, b in zip(plain, capped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert_bitwise_equal(plain, tokred.biased_attention(*inputs))


OK = Case(1, 2, 1, 3, 5, 8, 8)
BAD = [(value, "softcap must be positive") for value in (0.0, -1.0, torch.nan, torch.inf, 1e-45)]
test_bad_softcap = names_the_argument(
    [
        (getattr(tokred, op), make(OK, value), {}, message)
        for op, make in (
            ("biased_attention", dense),
            ("sparse_attention", listed),
            ("block_sparse_attention", blocked),
        )
        for value, message in BAD[: 5 if op == "biased_attention" else 1]
    ]
)
