"""combine_states: attention over disjoint sets of keys, put together."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.backends import Backend
from cases.compare import assert_one_result
from cases.inputs import FLOATS, generator
from cases.oracle import reference


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_halves_combine_to_the_whole(backend: Backend, dtype: torch.dtype) -> None:
    rng = generator(1)
    shapes = ((2, 4, 33, 40), (2, 2, 40, 40), (2, 2, 40, 40))
    q, k, v = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    parts = []
    for keys in (slice(0, 13), slice(13, 40)):
        parts += backend.run("biased_attention", q, k[:, :, keys], v[:, :, keys])
    out, lse = backend.run("combine_states", *parts)
    exact, exact_lse = reference.biased_attention(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=max(tolerance, 1e-5))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_combine_with_empty_sets(backend: Backend, dtype: torch.dtype) -> None:
    out_a, out_b = (torch.randn(2, 3, 5, 24, generator=generator(i)).to(dtype) for i in (1, 2))
    lse_a, lse_b = (torch.randn(2, 3, 5, generator=generator(i)) for i in (3, 4))
    out_a[0], lse_a[0] = torch.nan, -torch.inf
    out_b[:, 0], lse_b[:, 0] = torch.nan, -torch.inf
    out, lse = backend.run("combine_states", out_a, lse_a, out_b, lse_b)
    assert out[0, 0].eq(0).all() and lse[0, 0].eq(-torch.inf).all()
    assert out[0, 1:].equal(out_b[0, 1:]) and lse[0, 1:].equal(lse_b[0, 1:])
    assert out[1, 0].equal(out_a[1, 0]) and lse[1, 0].equal(lse_a[1, 0])
    torch.testing.assert_close(lse[1, 1:], torch.logaddexp(lse_a, lse_b)[1, 1:])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_combine_has_the_same_bits_everywhere(on_every_cpu, dtype: torch.dtype) -> None:
    outs = [torch.randn(2, 7, 3, 21, generator=generator(i)).to(dtype) for i in (1, 2)]
    width = torch.promote_types(dtype, torch.float32)
    lses = [torch.randn(2, 3, 7, generator=generator(i)).to(width) for i in (3, 4)]
    views = [t.transpose(1, 2) for t in outs]
    results = on_every_cpu(lambda: tokred.combine_states(views[0], lses[0], views[1], lses[1]))
    assert_one_result(results)
    exact = reference.combine_states(*(t.double() for t in (views[0], lses[0], views[1], lses[1])))
    for a, e in zip(results.popitem()[1], exact, strict=True):
        tolerance = 2 * torch.finfo(a.dtype).eps + 1e-6 * (dtype != torch.float64)
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)
