"""FTP's factors, choice and routing, token by token."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import picks_of
from tokred.methods.ftp import ftp, route, router_factors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors(dtype: torch.dtype) -> None:
    seen = torch.tensor([[0.5, 0.25, torch.nan, 0.5], [9.0, 0.25, 0.125, 0.25]]).to(dtype)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    got = router_factors(seen, torch.tensor([0.25, 0.5]), valid)
    assert got[0].tolist() == [
        [0, 1, 0, 0.25], [0.25, 0.5, 0.5, 0.25], [0.5, 0, 0.75, 0.25], [0.75, 1, 0.25, 0.25],
    ]  # fmt: skip
    third = torch.tensor([0.0, 1.0, 2.0]) / 3
    expected = torch.stack(
        [third, torch.tensor([1, 0.5, 1]), third[[0, 2, 1]], torch.full((3,), 0.5)], 1
    )
    assert not got[1, 0].any() and torch.equal(got[1, 1:], expected)
    assert torch.equal(router_factors(seen[1:], 0.5, valid[1:]), got[1:])
    assert router_factors(torch.zeros(1, 3), 0.0)[0, :, 1].tolist() == [0, 0, 0]


def test_choice() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.8, torch.nan, 0.7, 0.2]]).repeat(2, 1)
    valid = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    assert picks_of(ftp(scores, 0.5, valid)) == [[0, 1, 5], [2, 5]]
    assert picks_of(ftp(scores, 0.5, num_sinks=0, num_locals=0)) == [[1, 2, 4]] * 2
    assert picks_of(ftp(scores, 0.0, valid)) == [[*range(6)], [2, 3, 4, 5]]
    assert ftp(scores, 1.0).shape == (2, 0)
    for sparsity in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got"):
            ftp(scores, sparsity)


def test_others_pass_by() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    computed = torch.tensor([[0, 3, 4], [1, 2, -1]], dtype=torch.int32)
    gate = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.eye(3, dtype=torch.float64) * 2 + 1
    got, gated = (route(x, computed, lambda t: t @ weight + 1, g) for g in (None, gate))
    for row, inside in enumerate(([0, 3, 4], [1, 2])):
        for i in range(5):
            added = x[row, i] @ weight + 1 - x[row, i] if i in inside else 0 * x[row, i]
            torch.testing.assert_close(got[row, i], x[row, i] + added)
            torch.testing.assert_close(gated[row, i], x[row, i] + gate[row, i] * added)
    inputs = (x.requires_grad_(), gate.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: route(a, computed, lambda t: t @ weight + 1, b), inputs
    )
