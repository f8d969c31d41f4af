"""TTF-VLA's fusion of two frames, patch by patch."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.ttf_vla import fuse, pixel_difference, recompute, text_relevance


def test_pixels() -> None:
    new, old = torch.rand(2, 2, 3, 8, 12)
    given = pixel_difference(new, old, patch=4)
    assert given.shape == (2, 6)
    grey = [0.299 * f[:, 0] + 0.587 * f[:, 1] + 0.114 * f[:, 2] for f in (new, old)]
    away = (grey[0] - grey[1]).abs()
    for number in range(6):
        y, x = 4 * (number // 3), 4 * (number % 3)
        torch.testing.assert_close(given[:, number], away[:, y : y + 4, x : x + 4].mean((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relevance(dtype: torch.dtype) -> None:
    """20 keys, of which 3 to 14 are visual; the last five are the text that asks."""
    q, k = torch.randn(2, 4, 5, 8).to(dtype), torch.randn(2, 2, 20, 8).to(dtype)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5
    hidden = torch.ones(5, 20, dtype=torch.bool).triu(16)
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1).mean((1, 2))[:, 3:15]
    given = text_relevance(q, k, slice(3, 15))
    torch.testing.assert_close(given.double(), expected, rtol=1e-2, atol=1e-3)


def test_tokens_of_the_new_frame() -> None:
    difference = torch.tensor([[0.1, 0.2, 0.05, torch.nan, 0.0, 0.0]] * 2)
    relevance = torch.tensor([[1.0, 0.0, 3.0, 0.0, 3.0, 2.0], [torch.nan] * 6])
    assert recompute(difference, None).int().tolist() == [[0, 1, 0, 1, 0, 0]] * 2
    given = recompute(difference, relevance, keep=2)
    assert given.int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0]]
    assert recompute(difference, relevance, keyframe=True).all()
    assert recompute(difference, relevance, keep=99)[0].all()
    assert torch.equal(recompute(difference, relevance, keep=0), recompute(difference, None))
    tokens, cached = torch.randn(2, 2, 6, 3)
    fused = fuse(tokens, cached, given)
    for item in range(2):
        for i in range(6):
            source = tokens if given[item, i] else cached
            assert torch.equal(fused[item, i], source[item, i])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"pixels and previous must be \[B, 3, H, W\]"):
        pixel_difference(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 4))
    with pytest.raises(ValueError, match="keep must be at least 0, got -1"):
        recompute(torch.zeros(1, 4), keep=-1)
