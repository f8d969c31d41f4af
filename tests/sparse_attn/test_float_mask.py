"""Float masks, which are added to the logits: results, gradients, equal bits, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
    random_grads,
)
from cases.backends import Backend, move
from cases.bad_input import names_the_argument
from cases.biased_attention import Case
from cases.compare import assert_as_accurate, assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, widened
from cases.oracle import reference

CAP = 2.0


def numbers(case: Case, wide: bool = True) -> Tensor:
    """A mask of the case's shape, half of it -inf; of the dtype of q, or of its sums."""
    shape = {
        "heads": (1, case.heads_q, 1, case.keys),
        "pairs": (1, 1, case.queries, case.keys),
        "full": (case.batch, case.heads_q, case.queries, case.keys),
    }[case.mask]
    rng = generator(7)
    mask = torch.randn(shape, generator=rng) * 2
    mask[torch.rand(shape, generator=rng) < 0.4] = -torch.inf
    if case.mask == "full":
        mask[:, :, :1] = -torch.inf
    return mask.to(torch.promote_types(case.dtype, torch.float32) if wide else case.dtype)


def dense(case: Case, mask: Tensor, softcap: float | None = None) -> tuple:
    return (*case.inputs()[:6], mask, None, None, softcap)


def listed(case: Case, mask: Tensor, softcap: float | None = None, block_q: int = 1) -> tuple:
    q, k, v, bias, causal, scale, _ = case.inputs()
    shape = (case.batch, case.heads_kv, -(-case.queries // block_q), 24)
    indices = torch.randint(-2, case.keys + 2, shape, dtype=torch.int32, generator=generator(3))
    return (q, k, v, indices, scale, bias, causal, mask, block_q, None, None, softcap)


def shared(case: Case, mask: Tensor, softcap: float | None = None) -> tuple:
    return listed(case, mask, softcap, case.queries)


def blocked(case: Case, mask: Tensor, softcap: float | None = None) -> tuple:
    q, k, v, bias, causal, scale, _ = case.inputs()
    shape = (1, case.heads_q, -(-case.queries // 16), -(-case.keys // 16))
    blocks = torch.rand(shape, generator=generator(5)) < 0.6
    return (q, k, v, blocks, 16, 16, causal, scale, bias, mask, softcap)


MANY = Case(2, 4, 2, 37, 130, 32, 24, mask="full")
FEW = Case(2, 4, 2, 2, 133, 40, 24, mask="full", bias="holes")
PAIRS = replace(MANY, mask="pairs", causal=True)
HEADS = replace(MANY, mask="heads", bias="holes")
CALLS = [
    *(
        ("biased_attention", dense, replace(case, dtype=dtype), wide, cap)
        for case, cap in ((MANY, None), (FEW, None), (PAIRS, CAP))
        for dtype in FLOATS
        for wide in (True, False)[: 1 if dtype == torch.float32 else 2]
    ),
    ("biased_attention", dense, replace(MANY, dtype=torch.float64), True, None),
    ("biased_attention", dense, HEADS, True, None),
    ("biased_attention", dense, replace(FEW, mask="heads", queries=1), True, CAP),
    ("biased_attention", dense, Case(1, 2, 1, 20, 40, 256, 256, mask="full"), True, None),
    ("sparse_attention", listed, FEW, True, None),
    ("sparse_attention", shared, replace(PAIRS, dtype=torch.float16), False, CAP),
    ("block_sparse_attention", blocked, MANY, True, None),
]


@pytest.mark.parametrize(("op", "make", "case", "wide", "softcap"), CALLS)
def test_against_float64(
    backend: Backend, op: str, make: Any, case: Case, wide: bool, softcap: float | None
) -> None:
    inputs = make(case, numbers(case, wide), softcap)
    results = backend.run(op, *inputs)
    exact, plain = (getattr(reference, op)(*x) for x in (widened(inputs), inputs))
    if case.dtype in FLOATS[1:] and op == "biased_attention":
        plain = (in_half_precision(inputs), plain[1])
    assert_close_to_exact(results, exact, plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("op", "make", "case", "softcap"),
    [
        ("biased_attention", dense, replace(MANY, bias="full"), CAP),
        ("biased_attention", dense, PAIRS, None),
        ("biased_attention", dense, Case(1, 2, 1, 20, 30, 128, 128, mask="heads"), None),
        ("sparse_attention", listed, replace(FEW, bias="full", queries=5), None),
        ("block_sparse_attention", blocked, replace(MANY, bias="full"), None),
    ],
)
def test_gradients_against_float64(
    kernels: Backend, op: str, make: Any, case: Case, softcap: float | None, dtype: torch.dtype
) -> None:
    case = replace(case, dtype=dtype)
    inputs = make(case, numbers(case, wide=case.mask != "pairs"), softcap)
    assert_gradients_are_accurate(kernels, op, inputs)


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
    assert gradcheck(op, make(case, numbers(case), CAP))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_isa_and_threads_do_not_matter(on_every_cpu, dtype: torch.dtype) -> None:
    case = replace(MANY, dtype=dtype, causal=True, bias="holes")
    for op, inputs in (
        ("biased_attention", dense(case, numbers(case, wide=False), CAP)),
        ("sparse_attention", listed(case, numbers(case))),
    ):
        assert_same_on_every_cpu(on_every_cpu, op, inputs)


def test_batch_does_not_matter(kernels: Backend) -> None:
    case = Case(4, 4, 2, 21, 50, 32, 32, bias="full", mask="full", causal=True)
    assert_batch_does_not_matter(kernels, "biased_attention", dense(case, numbers(case)))


# ---- The gradient of the mask ------------------------------------------------------------------

SHARED = {  # what the dimensions of a mask [B, Hq, L, N] become
    "full": (2, 4, None), "heads": (1, 4, None), "batch": (2, 1, None), "pairs": (1, 1, None),
    "keys": (2, 4, 1), "all": (1, 1, 1),
}  # fmt: skip


def trained(shared: str, case: Case, wide: bool = True, softcap: float | None = None) -> tuple:
    """A call with a mask that is broadcast as `shared` says, a part of it -inf."""
    batch, heads, queries = SHARED[shared]
    shape = (batch, heads, case.queries if queries is None else queries, case.keys)
    rng = generator(11)
    mask = torch.randn(shape, generator=rng)
    mask[torch.rand(shape, generator=rng) < 0.3] = -torch.inf
    mask = mask.to(torch.promote_types(case.dtype, torch.float32) if wide else case.dtype)
    return dense(case, mask, softcap)


def mask_gradient(kernels: Backend, inputs: tuple) -> Tensor:
    grads = random_grads(inputs)
    q, k, v, bias, causal, scale, mask, *rest = inputs
    if kernels.name == "simt":
        results = torch.ops.tokred_simt.biased_attention(*inputs)
        return torch.ops.tokred_simt.biased_attention_mask_backward(
            *grads, q, k, v, bias, *results, causal, scale, mask, *rest
        ).to(mask.dtype)
    *given, grad_out, grad_lse = move([*inputs, *grads], kernels.device)
    leaf = given[6] = given[6].detach().requires_grad_()
    out, lse = kernels.function("biased_attention")(*given)
    grads = [grad_out, grad_lse.masked_fill(lse == -torch.inf, 0)]
    return torch.autograd.grad([out, lse], leaf, grads)[0].cpu()


@pytest.mark.parametrize(
    ("shared", "dtype", "dim", "wide"),
    [
        *((shared, torch.float32, 24, True) for shared in SHARED),
        *(("heads", dtype, 64, False) for dtype in FLOATS[1:]),
        ("keys", torch.bfloat16, 128, True),
        ("heads", torch.float32, 256, True),
        ("pairs", torch.float16, 256, True),
    ],
)
def test_mask_gradient_against_float64(
    kernels: Backend, shared: str, dtype: torch.dtype, dim: int, wide: bool
) -> None:
    small = dim > 64
    case = Case(2, 4, 2, 33 if small else 70, 40 if small else 141, dim, 16, dtype,
                bias="holes", causal=shared != "keys")  # fmt: skip
    inputs = trained(shared, case, wide, CAP if shared == "batch" else None)
    actual = mask_gradient(kernels, inputs)
    oracle = Backend("reference")
    exact, plain = mask_gradient(oracle, widened(inputs)), mask_gradient(oracle, inputs)
    assert actual.shape == exact.shape and actual.dtype == inputs[6].dtype
    assert (actual[inputs[6] == -torch.inf] == 0).all()
    unit = torch.finfo(dtype).eps * (2 if dtype in FLOATS[1:] else 8)
    assert_as_accurate(actual, exact, plain, 2 * unit * exact.abs().max().item(), "mask")


def with_a_hidden_nan(shared: str) -> tuple:
    inputs = trained(shared, replace(MANY, causal=True), softcap=CAP)
    inputs[1][:, :, 5], inputs[2][:, :, 5] = torch.nan, torch.inf
    inputs[6][..., 5] = -torch.inf
    return inputs


@pytest.mark.parametrize("shared", ["heads", "keys"])
def test_what_is_hidden_has_a_mask_gradient_of_0(kernels: Backend, shared: str) -> None:
    inputs = with_a_hidden_nan(shared)
    first = mask_gradient(kernels, inputs)
    assert first.isfinite().all() and (first[..., 5] == 0).all()
    assert_bitwise_equal(mask_gradient(kernels, inputs), first)


@pytest.mark.parametrize("shared", ["heads", "keys"])
def test_isa_and_threads_do_not_matter_to_it(on_every_cpu, shared: str) -> None:
    inputs = with_a_hidden_nan(shared)
    assert_one_result(on_every_cpu(lambda: [mask_gradient(Backend("cpu"), inputs)]))


def test_mask_gradient_of_nothing(kernels: Backend) -> None:
    """Without queries, batch entries or keys; and alone, without those of q, k and v."""
    for case in (replace(MANY, queries=0), replace(MANY, batch=0), replace(MANY, keys=0)):
        q, k, v, *_ = case.inputs()
        mask = torch.ones(1, 4, 1, case.keys)
        grad = mask_gradient(kernels, (q, k, v, None, False, None, mask, None, None, None))
        assert grad.shape == mask.shape and (grad == 0).all()


@pytest.mark.parametrize("queries", [2, 40])
def test_strides_and_dtypes_do_not_matter(kernels: Backend, queries: int) -> None:
    """The same numbers in another layout, and in a wider dtype."""
    case = replace(MANY, queries=queries, dtype=torch.bfloat16)
    mask = numbers(case, wide=False)
    one = kernels.run("biased_attention", *dense(case, mask))
    spread = torch.full((*mask.shape[:3], 2 * case.keys), torch.nan, dtype=mask.dtype)
    spread[..., ::2] = mask
    for other in (
        spread[..., ::2],
        mask.transpose(1, 3).contiguous().transpose(1, 3),
        mask.float(),
    ):
        assert_bitwise_equal(kernels.run("biased_attention", *dense(case, other)), one)


@pytest.mark.parametrize("queries", [2, 40])
def test_minus_infinity_hides_as_false_does(kernels: Backend, queries: int) -> None:
    """Whatever the keys and values hold; a query that sees nothing has zeros."""
    case = Case(1, 4, 2, queries, 260, 16, 16, mask="full")
    q, k, v, bias, causal, scale, visible = case.inputs()
    visible[:, :, :, 3] = visible[:, 1, 1] = False
    visible[:, :, : queries // 2, 64:] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    k[:, :, 3], v[:, :, 3] = torch.nan, torch.inf
    want = kernels.run("biased_attention", q, k, v, bias, causal, scale, visible)
    out, lse = kernels.run("biased_attention", q, k, v, bias, causal, scale, mask)
    assert_bitwise_equal([out, lse], list(want))
    assert (out[:, 1, 1] == 0).all() and (lse[:, 1, 1] == -torch.inf).all()


@pytest.mark.parametrize("queries", [2, 40])
def test_lowest_number_hides_nothing_alone(kernels: Backend, queries: int) -> None:
    """A row of the smallest float is the mean of all values, as in torch; beside others it is 0."""
    case = Case(1, 2, 2, queries, 70, 16, 16, mask="full")
    mask = torch.full((1, 1, queries, 70), torch.finfo(torch.float32).min)
    mask[:, :, 1, :30] = 0
    q, k, v = case.inputs()[:3]
    out, _ = kernels.run("biased_attention", q, k, v, None, False, None, mask)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_infinity_makes_a_row_nan(kernels: Backend) -> None:
    case = Case(1, 2, 2, 40, 70, 16, 16, mask="full")
    mask = torch.zeros(1, 1, 40, 70)
    mask[:, :, 5, 9], mask[:, :, 7, 9] = torch.inf, torch.nan
    out, lse = kernels.run("biased_attention", *dense(case, mask))
    lost = torch.tensor([5, 7])
    assert out[:, :, lost].isnan().all() and lse[:, :, lost].isnan().all()
    assert out.isnan().sum() == out[:, :, lost].numel()


OK = Case(1, 2, 1, 3, 5, 8, 8, mask="full")
MASK = numbers(OK)
test_bad_mask = names_the_argument(
    [
        *(
            (getattr(tokred, op), make(OK, MASK.double()), {}, "mask must be bool, float32 or")
            for op, make in (
                ("biased_attention", dense),
                ("sparse_attention", listed),
                ("block_sparse_attention", blocked),
            )
        ),
        (tokred.biased_attention, dense(OK, MASK.half()), {}, "mask must be bool, float32 or"),
        (tokred.biased_attention, dense(OK, MASK[..., :4]), {}, "mask must be"),
        (tokred.biased_attention, dense(OK, MASK[0]), {}, "mask must"),
        (
            tokred.sparse_attention,
            listed(OK, MASK.clone().requires_grad_()),
            {},
            "mask requires grad",
        ),
    ]
)
