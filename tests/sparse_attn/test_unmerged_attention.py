"""unmerged_attention against expanding, rotating, attending and averaging."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal
from cases.inputs import FLOATS, generator, label, widened
from cases.oracle import reference


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    positions: int = 150
    tokens: int = 37
    head_dim: int = 16
    value_dim: int = 24
    rotated: int | None = 8
    dtype: torch.dtype = torch.float32
    causal: bool = True
    garbage: bool = False
    last: int = 0
    large: float = 1.0

    def inputs(self) -> tuple:
        rng = generator(7)

        def heads(count: int, tokens: int, dim: int) -> Tensor:
            x = torch.randn(self.batch, count, tokens, dim, generator=rng)
            return x.to(self.dtype)

        own = 5 if self.last else self.tokens
        q = self.large * heads(self.heads_q, own, self.head_dim)
        k = heads(self.heads_kv, self.tokens, self.head_dim)
        v = heads(self.heads_kv, self.tokens, self.value_dim)
        low, high = (-2, self.tokens + 2) if self.garbage else (0, max(self.tokens, 1))
        shape = (self.batch, self.positions)
        token_map = torch.randint(low, high, shape, generator=rng, dtype=torch.int32)
        if self.garbage:
            token_map[:, 1::9], token_map[:, 2::11] = -(2**31), 2**31 - 1
        query_map = None
        if self.last:
            query_map = torch.randint(-1, own, (self.batch, self.last), generator=rng).int()
        cos = sin = None
        if self.rotated is not None:
            angles = torch.randn(1, self.positions, self.rotated, generator=rng)
            cos, sin = angles.cos(), angles.sin()
        return q, k, v, token_map, cos, sin, self.causal, None, query_map


CASES = [
    *(Case(dtype=dtype, causal=causal) for dtype in FLOATS for causal in (True, False)),
    *(Case(garbage=True, causal=causal) for causal in (True, False)),
    *(Case(rotated=rotated) for rotated in (None, 0, 3)),
    *(Case(positions=n, tokens=m) for n, m in ((0, 3), (1, 1), (5, 0), (97, 97), (40, 300))),
    *(Case(positions=140, tokens=n, batch=1, heads_q=1, heads_kv=1) for n in (520, 600)),
    *(Case(head_dim=d, value_dim=dv, rotated=d // 2, positions=70)
      for d, dv in ((1, 1), (5, 100), (130, 7), (256, 256))),
    *(Case(last=n, garbage=garbage) for n in (1, 40, 150) for garbage in (False, True)),
    Case(heads_q=9, heads_kv=3), Case(heads_q=3, heads_kv=3, large=40.0), Case(batch=0),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_against_float64(backend: Backend, case: Case) -> None:
    inputs = case.inputs()
    out = backend.run("unmerged_attention", *inputs)
    exact = reference.unmerged_attention(*widened(inputs))
    plain = reference.unmerged_attention(*inputs)
    assert out.dtype == case.dtype
    rounding = torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 2e-6
    assert_as_accurate(out, exact, plain, rounding * max(case.large, 2))


def test_is_attention_of_the_expanded_sequence(backend: Backend) -> None:
    """In torch alone: index_select, rotate_half, SDPA, scatter_reduce."""
    q, k, v, token_map, cos, sin, *_ = Case(batch=1, heads_q=2).inputs()
    rows = token_map[0].long()

    def rotate(x: Tensor) -> Tensor:
        whole_cos, whole_sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))
        left, right = x.chunk(2, -1)
        return x * whole_cos + torch.cat((-right, left), -1) * whole_sin

    wide = [rotate(t[:, :, rows]) for t in (q, k)]
    attended = F.scaled_dot_product_attention(*wide, v[:, :, rows], is_causal=True)
    index = rows[None, None, :, None].expand_as(attended)
    expected = torch.zeros(1, 2, 37, 24).scatter_reduce(
        2, index, attended, "mean", include_self=False
    )
    out = backend.run("unmerged_attention", q, k, v, token_map, cos, sin)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_without_merges_it_is_attention(backend: Backend) -> None:
    q, k, v, *_ = Case(positions=50, tokens=50).inputs()
    own = torch.arange(50, dtype=torch.int32).expand(2, 50)
    out = backend.run("unmerged_attention", q, k, v, own)
    expected, _ = reference.biased_attention(q, k, v, None, True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [60, 600])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_later_token_is_not_seen(kernels: Backend, tokens: int, value: float) -> None:
    """With a table of the weights of token pairs, and where that would be too large."""
    case = Case(batch=1, heads_q=1, heads_kv=1, positions=60, tokens=tokens, value_dim=64)
    q, k, v, _, cos, sin, *_ = case.inputs()
    token_map = torch.arange(60, dtype=torch.int32)[None]
    clean = kernels.run("unmerged_attention", q, k, v, token_map, cos, sin)
    for spoiled in (k, v):
        spoiled[:, :, 40] = value
        out = kernels.run("unmerged_attention", q, k, v, token_map, cos, sin)
        assert_bitwise_equal(out[:, :, :40], clean[:, :, :40])
        assert not out[:, :, 40].isfinite().any()
        spoiled[:, :, 40] = 0


def test_an_item_is_the_same_alone_and_on_any_number_of_threads(kernels: Backend) -> None:
    q, k, v, token_map, cos, sin, *_ = Case(batch=3, garbage=True).inputs()
    together = kernels.run("unmerged_attention", q, k, v, token_map, cos, sin)
    alone = kernels.run("unmerged_attention", q[1:2], k[1:2], v[1:2], token_map[1:2], cos, sin)
    assert_bitwise_equal(alone, together[1:2])
    torch.set_num_threads(16)
    many = kernels.run("unmerged_attention", q, k, v, token_map, cos, sin)
    torch.set_num_threads(1)
    assert_bitwise_equal(many, together)


def test_chunks_of_queries_are_the_whole(backend: Backend) -> None:
    """Tokens whose positions lie in one chunk."""
    q, k, v, _, cos, sin, *_ = Case(positions=60, tokens=20).inputs()
    token_map = (torch.arange(60) // 3).int().expand(2, 60)
    whole = backend.run("unmerged_attention", q, k, v, token_map, cos, sin)
    late = backend.run(
        "unmerged_attention", q[:, :, 15:], k, v, token_map, cos, sin,
        query_map=token_map[:, 45:] - 15,
    )  # fmt: skip
    torch.testing.assert_close(late, whole[:, :, 15:], rtol=1e-5, atol=1e-5)


def test_gradients_are_refused() -> None:
    q, k, v, token_map, *_ = Case().inputs()
    with pytest.raises(ValueError, match="no gradient, but q requires grad"):
        tokred.unmerged_attention(q.requires_grad_(), k, v, token_map)
