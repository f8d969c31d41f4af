"""CLCA's carriers through a stack of layers that drop tokens, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokred.methods.clca import carriers, recover, recovery_layers


@pytest.mark.parametrize("with_class", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carriers(with_class: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 5).to(dtype)
    for registers in (0, 2):
        for pool in (None, 6):
            given = carriers(x, registers, pool, with_class)
            last = 9 - registers if pool is None else pool
            mean = x[:, 0 if with_class else 1 : last].double().mean(1)
            assert given.shape == (2, 1 + registers, 5) and given.dtype == dtype
            torch.testing.assert_close(given[:, 0], mean.to(dtype), rtol=1e-2, atol=1e-6)
            assert torch.equal(given[:, 1:], x[:, 9 - registers :])


def test_through_layers() -> None:
    """Layers 1 and 3 of five drop two tokens; carriers come back behind them."""
    x, registers = torch.randn(2, 8, 3, requires_grad=True), 1
    recovery = recovery_layers([1, 3], 5)
    assert recovery == [1, 3]

    def layer(number: int, tokens: Tensor) -> Tensor:
        tokens = tokens * 1.5 + number
        return torch.cat([tokens[:, :1], tokens[:, 3:]], 1) if number in (1, 3) else tokens

    tokens, cached, num_pool = x, [], None
    for number in range(5):
        tokens = layer(number, tokens)
        if number in recovery:
            tokens, num_pool = recover(tokens, cached)
            cached = []
        if number < recovery[-1]:
            cached.append(carriers(tokens, registers, num_pool))

    def carried(t: Tensor, pool: int) -> Tensor:
        return torch.cat([t[:, 1:pool].mean(1, keepdim=True), t[:, -1:]], 1)

    zero = layer(0, x)
    one = torch.cat([layer(1, zero), carried(zero, 7)], 1)  # 6 tokens and 2 carriers
    two = layer(2, one)
    three = torch.cat([layer(3, two), carried(one, 6), carried(two, 6)], 1)
    torch.testing.assert_close(tokens, layer(4, three))
    tokens.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_edges_and_refusals() -> None:
    x = torch.randn(1, 1, 4)
    assert not carriers(x).any()
    assert torch.equal(carriers(x, with_class=True)[:, 0], x[:, 0])
    assert recovery_layers([3, 6], 12, at_last=True) == [3, 6, 10]
    with pytest.raises(ValueError, match="at most 1, the number of tokens, got 2 and 0"):
        carriers(x, num_pool=2)
    with pytest.raises(ValueError, match="num_registers must be at least 0, got -1"):
        carriers(x, num_registers=-1)
    with pytest.raises(ValueError, match="reduction must list layers from 0 to 11, got 12"):
        recovery_layers([12], 12)
