"""combine_linear: softmax over chosen keys and linear attention over the rest, in one sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokred
from cases.inputs import generator

B, HQ, HKV, N, D, FEATURES = 2, 4, 2, 50, 8, 6


def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = generator(3)

    def heads(count: int, dim: int) -> Tensor:
        return torch.randn(B, count, N, dim, generator=rng, dtype=torch.float64).to(dtype)

    q, k, v = heads(HQ, D), heads(HKV, D), heads(HKV, D)
    phi_q, phi_k = heads(HQ, FEATURES).exp(), heads(HKV, FEATURES).exp()
    chosen = torch.rand(B, N, generator=rng) < 0.3
    return q, k, v, phi_q, phi_k, chosen


def hybrid(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, chosen: Tensor,
    constant: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal. The constant is added to every logit, those that the features stand for included."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    listed, _ = tokred.compact(chosen)
    lists = listed[:, None, None].expand(B, 1, N, N).contiguous()
    bias = torch.full((B, 1, N), constant, dtype=wide)
    out, lse = tokred.sparse_attention(q, k, v, lists, key_bias=bias, causal=True)
    values = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    never = torch.zeros(HKV, dtype=wide)
    sums, _ = tokred.linear_attention(phi_q, phi_k, values, never, mask=~chosen)
    shift = torch.full((1,), constant, dtype=wide)
    return tokred.combine_linear(out, lse, sums[..., :-1], sums[..., -1], shift)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    k, v, phi_k = (t.repeat_interleave(HQ // HKV, 1) for t in (k, v, phi_k))
    exact = (q @ k.mT * D**-0.5).exp()
    weight = torch.where(chosen[:, None, None], exact, phi_q @ phi_k.mT).tril()
    return weight @ v / weight.sum(-1, keepdim=True), weight.sum(-1).log()


def test_is_one_attention_over_both_sets() -> None:
    args = inputs(torch.float64)
    for actual, expected in zip(hybrid(*args), by_definition(*args), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [-300.0, -1.0, 7.0, 300.0])
def test_a_constant_added_to_all_logits_changes_nothing(constant: float) -> None:
    """Though exp(300) is beyond float32."""
    args = inputs(torch.float32)
    out, lse = hybrid(*args)
    shifted, shifted_lse = hybrid(*args, constant=constant)
    torch.testing.assert_close(shifted, out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted_lse, lse + constant, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    args = inputs(dtype)
    floats = [t.double() if t.is_floating_point() else t for t in args]
    out, _ = hybrid(*args)
    assert out.dtype == dtype
    error = (out.double() - by_definition(*floats)[0]).abs().max()
    assert error < 20 * torch.finfo(dtype).eps


def test_an_empty_part_counts_nothing() -> None:
    *args, _ = inputs(torch.float64)
    for share in (True, False):
        chosen = torch.full((B, N), share)
        out, lse = hybrid(*args, chosen)
        expected = by_definition(*args, chosen)
        torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)
