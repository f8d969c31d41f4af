"""LSSAR against the published formulas on whole matrices, in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tokred.methods.lssar import softplus_attention


def plain(q: Tensor, k: Tensor, v: Tensor, power: float | None) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    first = k.shape[2] - q.shape[2]
    n = torch.arange(first, k.shape[2]).double()[:, None] + 1
    a = torch.log1p(torch.exp(math.log(q.shape[3]) * n.log() * (q @ k.transpose(2, 3))))
    a = a.tril(first)
    a = a / a.sum(-1, keepdim=True)
    if power is not None:
        offset = (n > 3).double()
        a = ((a * n - offset).clamp(min=0)).tril(first) ** power
        total = a.sum(-1, keepdim=True)
        a = torch.where(total > 0, a / total, 0)
    return a @ v


@pytest.mark.parametrize("power", (None, 3.0, 15.0))
@pytest.mark.parametrize(("queries", "block"), ((40, 128), (40, 7), (1, 4), (13, 13)))
def test_whole_matrix(power: float | None, queries: int, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 16, generator=generator)
    k = torch.randn(2, 2, 40, 16, generator=generator)
    v = torch.randn(2, 2, 40, 5, generator=generator)
    out = softplus_attention(q, k, v, power, block)
    torch.testing.assert_close(out, plain(q, k, v, power).float(), rtol=1e-4, atol=1e-5)


def test_a_great_power_does_not_overflow() -> None:
    """One key of thousands takes all the weight, whose power alone is far beyond float32."""
    k = torch.zeros(1, 1, 3000, 8)
    k[..., 0], k[..., 5, 0], k[..., 5, 1] = -1.0, 0.0, 1.0
    q = torch.zeros(1, 1, 1, 8)
    q[..., 1] = 1.0
    v = torch.randn(1, 1, 3000, 4, generator=torch.Generator().manual_seed(0))
    q = q * 1.0
    out = softplus_attention(q - 0.3 * k[:, :, :1].abs(), k, v, 40.0)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, 5], rtol=1e-3, atol=1e-3)


def test_no_key_above_the_mean_gives_zero() -> None:
    same = torch.ones(1, 1, 9, 4)
    out = softplus_attention(same, same, torch.randn(1, 1, 9, 4))
    assert out.isfinite().all() and (out[:, :, 3:] == 0).all()


def test_gradient() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: softplus_attention(*x, None, 4), (q, k, v))


def test_refusals() -> None:
    q, k = torch.zeros(1, 3, 5, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"q must be \[1, a multiple of 2, at most 5, 4\]"):
        softplus_attention(q, k, k)
    with pytest.raises(ValueError, match="power must be above 0, got 0"):
        softplus_attention(k, k, k, 0)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        softplus_attention(k, k, k, block=0)
