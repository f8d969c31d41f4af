"""MrT5's gate, attention and deletion against the published formulas."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.mrt5 import delete, deletion_gate, gated_attention, keep_bias


def test_gate() -> None:
    logits = torch.tensor([[-9.0, 0.0, 9.0, 3.0]])
    gate = deletion_gate(logits, torch.tensor([[True, True, True, False]]))
    expected = -10 / (1 + logits.exp())
    torch.testing.assert_close(gate[:, :3], expected[:, :3])
    assert gate[0, 3] == -10


@pytest.mark.parametrize("add_one", (False, True))
def test_attention(add_one: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator)
    gate = deletion_gate(torch.randn(2, 9, generator=generator))
    weights = torch.exp(q @ k.transpose(2, 3) * 8**-0.5 + gate[:, None, None])
    expected = weights @ v / (weights.sum(-1, keepdim=True) + add_one)
    out = gated_attention(q, k, v, gate, add_one=add_one)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_delete() -> None:
    h = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gate = torch.tensor([[-1.0, -9, -4, -9, -2, -3], [-9, -9, -9, -5, -9, -9]])
    mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    kept = delete(h, gate, mask=mask)
    assert kept.lengths.tolist() == [3, 0]
    assert kept.positions[0].tolist() == [0, 2, 4, -1, -1, -1]
    assert kept.token_map.tolist() == [[0, -1, 1, -1, 2, -1], [-1] * 6]
    assert torch.equal(kept.h[0, :3], h[0, [0, 2, 4]]) and (kept.h[0, 3:] == 0).all()
    kept.h.sum().backward()
    assert h.grad[0, :, 0].tolist() == [1, 0, 1, 0, 1, 0] and (h.grad[1] == 0).all()
    small = delete(h, gate, mask=mask, capacity=2)
    assert small.h.shape == (2, 2, 3) and small.lengths.tolist() == [2, 0]
    assert small.token_map[0].tolist() == [0, -1, 1, -1, -1, -1]


def test_position_bias() -> None:
    bias = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 2, 5], [4, -1, -1]], dtype=torch.int32)
    kept = keep_bias(bias, positions)
    assert torch.equal(kept[0], bias[0][:, [0, 2, 5]][:, :, [0, 2, 5]])
    assert torch.equal(kept[1, :, 0, 0], bias[0, :, 4, 4])
    assert (kept[1, :, 1:] == 0).all() and (kept[1, :, :, 1:] == 0).all()
