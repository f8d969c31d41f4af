"""sparse_attention against its float64 oracle, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    gradients,
    random_bias,
    random_grads,
    random_mask,
    random_qkv,
)
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call. `lists` are per query head, per key head, or for all heads."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    queries: int = 5
    keys: int = 40
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    lists: str = "kv"
    length: int = 24
    block_q: int = 1
    bias: str = "none"
    causal: bool = False
    mask: str = "none"
    invalid: bool = True
    magnitude: float = 1.0

    def inputs(self) -> tuple:
        rng = generator(1)
        qkv = random_qkv(self, rng, self.magnitude)
        heads = {"head": self.heads_q, "kv": self.heads_kv, "one": 1}[self.lists]
        shape = (self.batch, heads, -(-self.queries // self.block_q), self.length)
        margin = 3 if self.invalid else 0
        high = max(self.keys + margin, 1)
        indices = torch.randint(-margin, high, shape, dtype=torch.int32, generator=rng)
        if self.invalid:
            indices[..., 1::11] = -(2**31)
            indices[..., 2::13] = 2**31 - 1
        bias = None
        if self.bias != "none":
            hidden = 3 if self.bias == "holes" else None
            bias = random_bias(self, rng, self.bias == "shared", hidden)
        mask = random_mask(self, rng, 0.6)
        return (*qkv, indices, None, bias, self.causal, mask, self.block_q)


SIZES = [
    Case(),
    Case(1, 1, 1, 1, 1, 1, 1, length=1, invalid=False),
    Case(length=0),
    Case(length=1),
    Case(keys=6, length=50),
    Case(keys=0, length=5),
    Case(queries=0),
    Case(batch=0),
    Case(1, 9, 3, 1, 70, 64, 64, length=40),
    Case(1, 9, 3, 4, 70, 80, 80, lists="head", causal=True),
    Case(1, 8, 1, 1, 90, 128, 128, length=80),
    Case(1, 2, 2, 3, 30, 256, 7, lists="one"),
    Case(1, 6, 2, 33, 50, 24, 40, lists="kv", block_q=8),
    Case(1, 4, 1, 20, 50, 20, 24, lists="one", block_q=20, causal=True),
    Case(1, 2, 1, 70, 50, 7, 5, lists="head", block_q=64, causal=True),
    Case(1, 4, 2, 2, 300, 8, 8, length=2600),
    Case(3, 4, 2, 3, 300, 8, 8, length=1100),
]
OPTIONS = [
    Case(lists=lists, block_q=block_q, bias=bias, mask=mask, causal=causal)
    for lists in ("head", "kv", "one")
    for block_q in (1, 3)
    for bias, mask in (("none", "none"), ("full", "keys"), ("holes", "full"), ("shared", "heads"))
    for causal in (False, True)
]
CASES = [
    *(replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS),
    *(replace(case, dtype=torch.float64) for case in SIZES[:9]),
    *OPTIONS,
    *(Case(bias="holes", mask="full", causal=True, block_q=2, dtype=d) for d in FLOATS[1:]),
    *(Case(magnitude=m, bias="full", dtype=d) for m in (1e-3, 30, 300) for d in FLOATS),
    Case(queries=30, keys=20, causal=True, block_q=4),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    results = backend.run("sparse_attention", *inputs)
    exact, plain = (reference.sparse_attention(*x) for x in (widened(inputs), inputs))
    largest_value = inputs[2].abs().max().item() if inputs[2].numel() else 0
    assert_close_to_exact(results, exact, plain, largest_value)


@pytest.mark.parametrize("lists", ["head", "kv", "one"])
def test_all_keys_equal_dense_attention(backend: Backend, lists: str) -> None:
    q, k, v, indices, *_ = Case(queries=7, lists=lists, length=40).inputs()
    every = torch.arange(40, dtype=torch.int32).expand(indices.shape)
    bias = torch.randn(2, 2, 40, generator=generator(3))
    sparse = backend.run("sparse_attention", q, k, v, every, None, bias, True, None, 1)
    dense = reference.biased_attention(q, k, v, bias, causal=True)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_a_key_listed_twice_counts_twice(backend: Backend) -> None:
    q, k, v, *_ = Case().inputs()
    double = torch.zeros(1, 1, 40)
    double[..., 7] = torch.tensor(2.0).log()
    twice, once = (
        torch.tensor(keys, dtype=torch.int32).expand(2, 1, 5, -1) for keys in ([3, 7, 7], [3, 7])
    )
    expected = backend.run("sparse_attention", q, k, v, once, None, double)
    for a, b in zip(backend.run("sparse_attention", q, k, v, twice), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_queries_without_keys_are_zero(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v, indices, *_ = Case(queries=9, keys=6, dtype=dtype).inputs()
    everything = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    hidden = torch.full((1, 1, 6), -torch.inf)
    for arguments in (
        (torch.full_like(indices, -1),),
        (torch.full_like(indices, 6),),
        (indices[..., :0],),
        (indices, None, None, False, ~everything),
        (indices, None, hidden),
    ):
        out, lse = backend.run("sparse_attention", q, k, v, *arguments, block_q=1)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
    out, lse = backend.run("sparse_attention", q, k, v, indices, causal=True, block_q=1)
    assert out[:, :, :3].eq(0).all() and lse[:, :, :3].eq(-torch.inf).all()


@pytest.mark.parametrize("block_q", [1, 5])
def test_keys_that_no_query_sees_are_not_looked_at(kernels: Backend, block_q: int) -> None:
    case = Case(keys=60, mask="keys", bias="holes", block_q=block_q)
    q, k, v, indices, scale, bias, causal, mask, _ = case.inputs()
    indices = indices.where(indices % 4 != 0, -1)
    unseen = ~mask[:, 0] | (torch.arange(60) % 4 == 0)  # [B, 1, N]
    if kernels.name.startswith("cpu"):  # CUDA reads the keys whose bias hides them
        unseen = unseen | (bias == -torch.inf)
    unseen = unseen[..., None].expand(2, 2, 60, 1)
    rest = (indices, scale, bias, causal, mask, block_q)
    clean = kernels.run("sparse_attention", q, k, v, *rest)
    k, v = k.masked_fill(unseen, torch.nan), v.masked_fill(unseen, torch.nan)
    assert_bitwise_equal(kernels.run("sparse_attention", q, k, v, *rest), clean)


def test_views_equal_their_copies(kernels: Backend) -> None:
    """Caches [B, N, H, D] with their heads moved; every other list, entry table and mask column."""
    rng = generator(4)
    k, v = (torch.randn(2, 50, 2, 24, generator=rng).transpose(1, 2) for _ in "kv")
    q = torch.randn(2, 7, 6, 24, generator=rng).transpose(1, 2)
    indices = torch.randint(0, 50, (2, 4, 14, 30), dtype=torch.int32, generator=rng)
    indices = indices[:, ::2, ::2, 5:]
    mask = (torch.rand(2, 100, generator=rng) < 0.8)[:, ::2][:, None, None]
    bias = torch.rand(50, 2, generator=rng).t()[:, None]
    views = (q, k, v, indices, None, bias, True, mask, 1)
    copies = [t.contiguous() if isinstance(t, Tensor) else t for t in views]
    first = kernels.run("sparse_attention", *views)
    assert_bitwise_equal(first, kernels.run("sparse_attention", *copies))


def test_padding_does_not_matter(kernels: Backend) -> None:
    """Entries of -1 behind or between the others change nothing."""
    q, k, v, indices, *_ = Case(invalid=False, queries=3).inputs()
    first = kernels.run("sparse_attention", q, k, v, indices)
    padded = torch.full((*indices.shape[:-1], 48), -1, dtype=torch.int32)
    padded[..., :24] = indices
    assert_bitwise_equal(kernels.run("sparse_attention", q, k, v, padded), first, "behind")
    padded[..., :24], padded[..., ::2] = -1, indices
    between = kernels.run("sparse_attention", q, k, v, padded)
    if kernels.name.startswith("cpu"):
        assert_bitwise_equal(between, first, "between")
    else:  # tiles hold the empty entries, so that others are summed in other places
        for a, b in zip(between, first, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block_q", [1, 3, 100])
def test_blocks_of_queries_equal_repeated_lists(backend: Backend, block_q: int) -> None:
    inputs = Case(queries=20, lists="head", block_q=block_q, causal=True, mask="full").inputs()
    q, k, v, indices, scale, bias, causal, mask, _ = inputs
    repeated = indices.repeat_interleave(min(block_q, 20), 2)[:, :, :20].contiguous()
    blocks = backend.run("sparse_attention", *inputs)
    single = backend.run("sparse_attention", q, k, v, repeated, scale, bias, causal, mask, 1)
    for a, b in zip(blocks, single, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lists", ["head", "kv", "one"])
@pytest.mark.parametrize("block_q", [1, 4])
def test_rotation(backend: Backend, dtype: torch.dtype, lists: str, block_q: int) -> None:
    """Against an explicit RoPE of the listed keys; tables that are longer than the lists."""
    q, k, v, indices, *_ = Case(
        queries=4, lists=lists, block_q=block_q, dtype=dtype, length=30
    ).inputs()
    angle = torch.rand(33, 8, generator=generator(2)) * 6
    cos, sin = angle.cos(), angle.sin()
    options = {"block_q": block_q, "rope_cos": cos, "rope_sin": sin}
    out, lse = backend.run("sparse_attention", q, k, v, indices, **options)
    heads, rows = torch.arange(4), torch.arange(4) // block_q
    expanded = indices.long().repeat_interleave(4 // indices.shape[1], 1)[:, heads][:, :, rows]
    valid = (expanded >= 0) & (expanded < 40)
    at = expanded.clamp(0, 39)
    batches = torch.arange(2)[:, None, None, None]
    kv_heads = (heads // 2)[None, :, None, None]
    listed, values = (t.double()[batches, kv_heads, at] for t in (k, v))
    phase = torch.complex(cos, sin)[:30].to(torch.complex128)
    turned = torch.complex(*listed.chunk(2, -1)) * phase
    logits = 0.25 * torch.einsum(
        "bhld,bhlkd->bhlk", q.double(), torch.cat((turned.real, turned.imag), -1)
    )
    logits = logits.masked_fill(~valid, -torch.inf)
    exact = torch.einsum("bhlk,bhlkd->bhld", logits.softmax(-1), values)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=2e-5, atol=2e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=max(tolerance, 1e-5))


# ---- Gradients ----------------------------------------------------------------------------------


GRADIENT_CASES = [
    Case(),
    Case(1, 6, 2, 9, 40, 32, 24, bias="full", lists="head"),
    Case(1, 9, 3, 33, 40, 80, 64, bias="shared", lists="kv", block_q=16, causal=True),
    Case(bias="holes", mask="full", causal=True, lists="one", block_q=2),
    Case(queries=30, keys=20, causal=True, mask="keys", bias="full"),
    Case(1, 1, 1, 1, 1, 1, 1, bias="full", length=1, invalid=False),
    Case(keys=0, length=3),
    Case(length=0, bias="full"),
    Case(1, 2, 1, 3, 200, 7, 5, length=150, bias="full"),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=label)
def test_gradients_against_float64(kernels: Backend, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    if case.length == 0 or case.keys == 0:
        for grad in gradients(kernels, "sparse_attention", inputs, *random_grads(inputs)):
            assert grad.eq(0).all()
        return
    assert_gradients_are_accurate(kernels, "sparse_attention", inputs)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 3, 5, 4, 3, length=6, bias="full"),
        Case(2, 2, 1, 3, 5, 4, 4, length=4, bias="shared", causal=True, lists="head"),
        Case(1, 2, 2, 5, 4, 4, 4, length=5, mask="full", causal=True, block_q=2),
        Case(1, 4, 2, 3, 6, 4, 4, length=5, bias="holes", mask="keys", lists="one"),
    ],
    ids=label,
)
def test_gradcheck(one_thread: None, case: Case) -> None:
    assert gradcheck("sparse_attention", replace(case, dtype=torch.float64).inputs())


# ---- The same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [30, 1500])
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype, length: int) -> None:
    case = Case(4, 4, 2, 3, 50, 8, 8, dtype, length=length, bias="full", mask="keys", causal=True)
    assert_batch_does_not_matter(kernels, "sparse_attention", case.inputs())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 9, 3, 2, 133, 72, 64, bias="full", mask="full", length=90),
        Case(1, 2, 1, 40, 60, 20, 28, causal=True, block_q=16, lists="head"),
        Case(1, 2, 1, 2, 500, 16, 16, length=3000),
    ],
    ids=label,
)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_same_on_every_cpu(on_every_cpu, "sparse_attention", inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotation_has_the_same_bits_everywhere(on_every_cpu, dtype: torch.dtype) -> None:
    q, k, v, indices, *_ = Case(dtype=dtype, head_dim=40).inputs()
    angle = torch.rand(24, 20, generator=generator(2)) * 6
    options = {"rope_cos": angle.cos(), "rope_sin": angle.sin()}
    assert_one_result(on_every_cpu(lambda: tokred.sparse_attention(q, k, v, indices, **options)))
