"""biased_attention with few queries: split over the keys, and one read for all heads of a group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tokred
from cases.attention import assert_close_to_exact, random_bias, random_mask, random_qkv
from cases.backends import Backend
from cases.compare import assert_bitwise_equal, assert_one_result
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    heads_kv: int = 2
    group: int = 4
    queries: int = 1
    keys: int = 150
    head_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    bias: bool = False
    causal: bool = False
    mask: str = "none"
    magnitude: float = 1.0

    @property
    def heads_q(self) -> int:
        return self.heads_kv * self.group

    def inputs(self) -> tuple:
        rng = generator(1)
        qkv = random_qkv(self, rng, self.magnitude)
        bias = random_bias(self, rng, hidden=5) if self.bias else None
        return (*qkv, bias, self.causal, None, random_mask(self, rng, 0.5))


SIZES = [
    *(Case(group=group) for group in (1, 2, 3, 4, 5, 8)),
    *(Case(keys=keys) for keys in (0, 1, 15, 16, 17, 64, 65)),
    *(Case(1, 1, 2, keys=keys, head_dim=8, value_dim=8) for keys in (1024, 1025, 2500)),
    Case(1, 3, 3, head_dim=64, value_dim=64),
    Case(1, 1, 2, head_dim=80, value_dim=80),
    Case(1, 1, 4, head_dim=128, value_dim=128),
    Case(1, 1, 4, head_dim=256, value_dim=256),
    Case(1, 1, 4, head_dim=7, value_dim=37),
    Case(1, 2, 2, queries=4, causal=True),
    Case(1, 1, 1, queries=8, keys=5, causal=True),
    Case(0),
]
CASES = [
    *(replace(case, dtype=dtype) for case in SIZES for dtype in FLOATS),
    *(replace(case, dtype=torch.float64) for case in SIZES),
    *(
        Case(queries=queries, group=2, bias=bias, mask=mask, causal=causal)
        for queries in (1, 3)
        for bias in (False, True)
        for mask in ("none", "padding", "heads", "full")
        for causal in (False, True)
    ),
    *(Case(magnitude=m, bias=True, dtype=d) for m in (1e-3, 30, 300) for d in FLOATS),
]


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(kernels: Backend, case: Case) -> None:
    inputs = case.inputs()
    results = kernels.run("biased_attention", *inputs)
    exact, plain = (reference.biased_attention(*x) for x in (widened(inputs), inputs))
    largest_value = inputs[2].abs().max().item() if inputs[2].numel() else 0
    assert_close_to_exact(results, exact, plain, largest_value)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(1, 3, 3, head_dim=20, value_dim=36, mask="padding", bias=True),
        Case(1, 2, 2, queries=3, causal=True, mask="full"),
        Case(1, 1, 8, keys=2500, head_dim=8, value_dim=8),
        Case(1, 1, 40, keys=2500, head_dim=8, value_dim=8, mask="padding"),
        Case(6, 4, 2, keys=1100, head_dim=8, value_dim=8),
    ],
    ids=label,
)
def test_a_list_of_all_keys_gives_the_same_bits(
    on_every_cpu, case: Case, dtype: torch.dtype
) -> None:
    q, k, v, bias, causal, scale, mask = replace(case, dtype=dtype).inputs()
    every = torch.arange(case.keys, dtype=torch.int32).expand(case.batch, 1, 1, -1)
    rest = (every, scale, bias, causal, mask, case.queries)
    dense = on_every_cpu(lambda: tokred.biased_attention(q, k, v, bias, causal, scale, mask))
    sparse = on_every_cpu(lambda: tokred.sparse_attention(q, k, v, *rest))
    first = next(iter(dense.values()))
    for name in dense:
        assert_bitwise_equal(dense[name], first, f"dense, {name}")
        assert_bitwise_equal(sparse[name], first, f"sparse, {name}")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_few_queries_agree_with_many(kernels: Backend, dtype: torch.dtype) -> None:
    """Eight rows and nine are worked on in different ways, but of one query."""
    q, k, v, *_ = Case(group=1, queries=9, head_dim=40, dtype=dtype).inputs()
    out, lse = kernels.run("biased_attention", q, k, v)
    few_out, few_lse = kernels.run("biased_attention", q[:, :, :8], k, v)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-14)
    torch.testing.assert_close(few_out, out[:, :, :8], rtol=tolerance, atol=tolerance)
    tolerance = 8 * torch.finfo(lse.dtype).eps
    torch.testing.assert_close(few_lse, lse[:, :, :8], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", [70, 1300])
def test_hidden_keys_are_not_looked_at(kernels: Backend, keys: int) -> None:
    """Left padding, whatever the cache holds there."""
    case = Case(keys=keys, head_dim=8, value_dim=8)
    q, k, v, *_ = case.inputs()
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[0, ..., :50], mask[1, ..., :3] = False, False
    hidden = ~mask.transpose(2, 3)
    clean = kernels.run("biased_attention", q, k, v, mask=mask)
    v, k = v.masked_fill(hidden, torch.nan), k.masked_fill(hidden, torch.nan)
    assert_bitwise_equal(kernels.run("biased_attention", q, k, v, mask=mask), clean)
    out, _ = kernels.run("biased_attention", q[:1], k[:1, :, 50:], v[:1, :, 50:])
    torch.testing.assert_close(out, clean[0][:1])


def test_nothing_visible(kernels: Backend) -> None:
    q, k, v, *_ = Case().inputs()
    hidden = torch.full((1, 1, 150), -torch.inf)
    mask = torch.zeros(1, 1, 1, 150, dtype=torch.bool)
    for options in ({"key_bias": hidden}, {"mask": mask}):
        out, lse = kernels.run("biased_attention", q, k, v, **options)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
    q, k, v, *_ = Case(group=1, queries=8, keys=5).inputs()
    out, lse = kernels.run("biased_attention", q, k, v, causal=True)
    assert out[:, :, :3].eq(0).all() and lse[:, :, :3].eq(-torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_caches_by_token_equal_caches_by_head(kernels: Backend, dtype: torch.dtype) -> None:
    """[B, N, H, D] with the heads moved, and a cache longer than what is in use."""
    case = Case(head_dim=24, value_dim=40, mask="padding", dtype=dtype)
    q, k, v, bias, causal, scale, mask = case.inputs()
    long = [torch.cat((t, torch.full_like(t, torch.nan)), 2) for t in (k, v)]
    views = [t.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :150] for t in long]
    first = kernels.run("biased_attention", q, k, v, bias, causal, scale, mask)
    second = kernels.run("biased_attention", q, *views, bias, causal, scale, mask)
    assert_bitwise_equal(second, first)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("keys", [100, 1500])
def test_batch_does_not_matter(kernels: Backend, dtype: torch.dtype, keys: int) -> None:
    """One sequence is split into several tasks, many are not."""
    case = Case(9, 2, 2, keys=keys, head_dim=8, value_dim=8, mask="padding", bias=True)
    inputs = replace(case, dtype=dtype).inputs()
    whole = kernels.run("biased_attention", *inputs)
    for index in (slice(0, 1), slice(5, 7), torch.randperm(9, generator=generator())):
        part = (t[index] if isinstance(t, Tensor) else t for t in inputs)
        assert_bitwise_equal(kernels.run("biased_attention", *part), [t[index] for t in whole])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 3, keys=3000, head_dim=72, value_dim=40, bias=True),
        Case(1, 2, 2, queries=4, keys=1100, causal=True, mask="full"),
    ],
    ids=label,
)
def test_isa_and_threads_do_not_matter(on_every_cpu, case: Case, dtype: torch.dtype) -> None:
    inputs = replace(case, dtype=dtype).inputs()
    assert_one_result(on_every_cpu(lambda: tokred.biased_attention(*inputs)))


def test_positions_hide_as_a_mask_does(kernels: Backend) -> None:
    """Two columns, and queries that see different keys."""
    q, k, v, *_ = Case(group=2, queries=3).inputs()
    rng = generator(5)
    query, key = (
        torch.randint(0, 9, (2, n, 2), dtype=torch.int32, generator=rng) for n in (3, 150)
    )
    mask = (key[:, None] <= query[:, :, None]).all(-1)[:, None]
    by_position = kernels.run("biased_attention", q, k, v, query_position=query, key_position=key)
    by_mask = kernels.run("biased_attention", q, k, v, mask=mask)
    if kernels.name.startswith("cpu"):
        assert_bitwise_equal(by_position, by_mask)
    for a, b in zip(by_position, by_mask, strict=True):
        torch.testing.assert_close(a, b)
