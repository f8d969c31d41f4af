"""ConceptMoE's chunking and dechunking against the published recursions, token by token."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods.concept_moe import balance_loss, boundary_probability, chunk, dechunk


def test_probability() -> None:
    q, k = tokens_of(2, 9), tokens_of(2, 10)[:, :9]
    p = boundary_probability(q, k)
    assert torch.equal(p[:, 0], torch.ones(2))
    for t in range(1, 9):
        cosine = functional.cosine_similarity(q[:, t - 1], k[:, t], dim=-1)
        torch.testing.assert_close(p[:, t], ((1 - cosine) / 2).clamp(0, 1))
    assert boundary_probability(q[:, :1], k[:, :1]).tolist() == [[1.0], [1.0]]


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = tokens_of(2, 9, 4)
    p = torch.tensor([[1, 0.2, 0.7, 0.5, 0.1, 0.4, 0.9, 0.3, 0.6], [1, 0.1] + [0.8] * 7])
    return h, p, torch.arange(9) < torch.tensor([[9], [2]])


def test_chunks_and_back() -> None:
    h, p, mask = case()
    concepts = chunk(h, p, mask=mask)
    assert concepts.lengths.tolist() == [5, 1]
    starts = [0, 2, 3, 6, 8]
    assert torch.equal(concepts.h[0, :5], h[0, starts]) and torch.equal(concepts.h[1, 0], h[1, 0])
    assert (concepts.h[0, 5:] == 0).all()
    assert concepts.token_map[0].tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4]
    assert concepts.token_map[1].tolist() == [0, 0] + [-1] * 7
    after = concepts.h * 2 + 1
    residual = tokens_of(2, 9, 4) * 3
    out = dechunk(after, concepts, residual)
    z = torch.zeros(4)
    for t in range(9):
        if t in starts:
            z = (1 - p[0, t]) * z + p[0, t] * after[0, starts.index(t)]
        torch.testing.assert_close(out[0, t], residual[0, t] + z)
    torch.testing.assert_close(out[1, 1], residual[1, 1] + after[1, 0])
    assert torch.equal(out[1, 2:], residual[1, 2:])
    small = chunk(h, p, capacity=2)
    assert small.h.shape == (2, 2, 4) and small.token_map[0].tolist() == [0, 0, 1] + [-1] * 6


def test_gradient_reaches_every_probability() -> None:
    h, p, _ = case()
    p = p.requires_grad_()
    dechunk(chunk(h, p).h + 1, chunk(h, p)).square().sum().backward()
    assert (p.grad != 0).all() and p.grad.isfinite().all()


def test_balance_loss() -> None:
    _, p, mask = case()
    boundary = p >= 0.5
    share, mean = 6 / 11, p[mask].mean().item()
    expected = 3 / 2 * (2 * share * mean + (1 - share) * (1 - mean))
    assert balance_loss(boundary, p, 3, mask).item() == pytest.approx(expected)
    even = torch.tensor([[True, False, False]])
    assert balance_loss(even, torch.full((1, 3), 1 / 3), 3).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="ratio must be above 1, got 1"):
        balance_loss(boundary, p, 1)
