"""GLOT's graph, its attention and its readout against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods.glot import graph_attention, readout, token_graph


def dense_edges(x: torch.Tensor, threshold: float, mask: torch.Tensor) -> torch.Tensor:
    unit = functional.normalize(x, dim=-1)
    edges = (unit @ unit.transpose(1, 2) > threshold) | torch.eye(x.shape[1], dtype=torch.bool)
    return edges & mask[:, None] & mask[:, :, None]


@pytest.mark.parametrize("block", (256, 4))
@pytest.mark.parametrize("threshold", (0.3, -1.0, 2.0))
def test_graph(threshold: float, block: int) -> None:
    x = tokens_of(2, 13)
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    graph = token_graph(x, threshold, mask, block)
    expected = dense_edges(x, threshold, mask)
    found = torch.zeros(26, 26, dtype=torch.bool)
    found[graph.targets, graph.sources] = True
    assert torch.equal(found, torch.block_diag(*expected))
    assert len(graph.sources) == expected.sum()
    assert torch.equal(graph.offsets.diff(), expected.sum(2).flatten())


def test_attention() -> None:
    x, mask = tokens_of(2, 13), torch.arange(13) < torch.tensor([[13], [9]])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator).requires_grad_()
    a, b = torch.randn(2, 6, generator=generator)
    out = graph_attention(x, token_graph(x, 0.3, mask), weight, a, b)
    values = x @ weight.T
    logits = functional.leaky_relu((values @ a)[:, None] + (values @ b)[:, :, None], 0.2)
    edges = dense_edges(x, 0.3, mask)
    weights = logits.masked_fill(~edges, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(out, weights @ values, rtol=1e-4, atol=1e-5)
    assert (out[1, 9:] == 0).all()
    gradient = torch.autograd.grad(out.square().sum(), weight)[0]
    expected = torch.autograd.grad((weights @ values).square().sum(), weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_readout() -> None:
    x, mask = tokens_of(2, 13), torch.arange(13) < torch.tensor([[13], [0]])
    score = torch.randn(2, 13, generator=torch.Generator().manual_seed(1))
    pooled = readout(x, score, mask)
    torch.testing.assert_close(pooled[0], score[0].softmax(0) @ x[0])
    assert (pooled[1] == 0).all()


def test_no_tokens() -> None:
    graph = token_graph(torch.zeros(2, 0, 4))
    assert graph.offsets.tolist() == [0] and len(graph.sources) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        token_graph(tokens_of(1, 4), block=0)
