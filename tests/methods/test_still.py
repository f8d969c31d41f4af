"""STILL's saliency and hybrid attention against matrices of all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokred.methods.still import hybrid_attention, norm_preserving_map, saliency, salient_tokens


def tensors(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 2, 3, tokens, 8, generator=generator)
    return q, k, v


def plain_saliency(q: Tensor, k: Tensor, window: int) -> Tensor:
    """The divergence of the two distributions, key by key."""
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    result = torch.zeros(q.shape[:3], dtype=torch.float64)
    for t in range(q.shape[2]):
        seen = logits[:, :, t, max(0, t - window + 1) : t + 1]
        with_itself = seen.softmax(-1)
        without = torch.zeros_like(with_itself)
        if seen.shape[-1] > 1:
            without[..., :-1] = seen[..., :-1].softmax(-1)
        p = with_itself[..., -1]
        terms = with_itself[..., :-1] * (with_itself[..., :-1] / without[..., :-1]).log()
        result[:, :, t] = terms.sum(-1) + p * ((p + 1e-8) / 1e-8).log()
    return result


@pytest.mark.parametrize(("tokens", "window"), ((30, 8), (5, 64)))
def test_saliency(tokens: int, window: int) -> None:
    q, k, _ = tensors(tokens)
    expected = plain_saliency(q, k, window).float()
    torch.testing.assert_close(saliency(q, k, window), expected, rtol=1e-3, atol=1e-3)


def test_salient_tokens() -> None:
    scores = torch.rand(2, 3, 21, generator=torch.Generator().manual_seed(0))
    chosen = salient_tokens(scores, 8, 2)
    assert chosen.shape == (2, 3, 3, 2)
    for part, start in enumerate((0, 8, 16)):
        best = scores[..., start : start + 8].topk(2).indices.sort(-1).values + start
        assert torch.equal(chosen[:, :, part], best.int())


def test_feature_map() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    mirror = torch.randn(8, generator=torch.Generator().manual_seed(3))
    features = norm_preserving_map(x, weight, mirror)
    householder = torch.eye(8) - 2 * mirror[:, None] * mirror / (mirror @ mirror)
    u = x @ householder.T @ weight.T
    u = u / u.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    expected = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", (7, 16, 50))
@pytest.mark.parametrize("gated", (False, True))
def test_hybrid_attention(tokens: int, gated: bool) -> None:
    chunk, count = 8, 2
    q, k, v = tensors(tokens)
    generator = torch.Generator().manual_seed(4)
    features_q, features_k = torch.rand(2, 2, 3, tokens, 6, generator=generator)
    gate = torch.rand(2, 3, tokens, 1, generator=generator) if gated else None
    chosen = salient_tokens(saliency(q, k, chunk), chunk, count)
    exact = torch.zeros(2, 3, tokens, tokens, dtype=torch.bool)
    for i in range(tokens):
        exact[:, :, i, max(0, (i // chunk - 1) * chunk) : i + 1] = True
        for part in range(max(0, i // chunk - 1)):
            for item in range(2):
                for head in range(3):
                    exact[item, head, i, chosen[item, head, part].long()] = True
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    weights = torch.exp(q @ k.transpose(2, 3) * 8**-0.5) * exact
    linear = (features_q @ features_k.transpose(2, 3)) * (causal & ~exact)
    above = weights @ v + (linear @ v) * (1 if gate is None else gate)
    expected = above / (weights.sum(-1, keepdim=True) + linear.sum(-1, keepdim=True))
    out = hybrid_attention(q, k, v, features_q, features_k, gate, chunk, count)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    q, k, v = tensors(5)
    with pytest.raises(ValueError, match="k and v must have the 3 heads of q"):
        hybrid_attention(q, k[:, :1], v, q, k)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        saliency(q, k, 0)
