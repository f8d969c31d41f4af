"""Focus-DETR's cascade, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokred.methods.focus_detr import SHARES, focus_encoder, foreground_counts


def double_and_position(rows: Tensor, indices: Tensor) -> Tensor:
    """A layer that shows which tokens it ran on, and as what."""
    return rows * 2 + indices[..., None].clamp(min=0).to(rows.dtype) / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 40])
def test_layers(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, 4, generator=generator).to(dtype)
    scores = torch.randn(3, tokens, generator=generator)
    scores[1] = scores[1].round()  # ties
    valid = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2], [1]])
    given = focus_encoder(x, scores, [double_and_position] * 6, valid)
    for item in range(3):
        real = int(valid[item].sum())
        foreground = int(real * 0.5) + 1
        ranked = sorted(range(real), key=lambda i: (-scores[item, i].item(), i))
        expected = x[item].clone()
        for share in SHARES:
            for i in ranked[: min(int(round(foreground * share, 9)), real)]:
                expected[i] = expected[i] * 2 + torch.tensor(i).to(dtype) / 64
        assert torch.equal(given[item], expected)
    alone = focus_encoder(x[1:2], scores[1:2], [double_and_position] * 6, valid[1:2])
    assert torch.equal(alone[0], given[1])


def test_counts_and_gradients() -> None:
    valid = torch.arange(100) < torch.tensor([[100], [30], [0]])
    assert foreground_counts(valid, 0.5, 0.8).tolist() == [40, 12, 0]
    x = torch.randn(3, 100, 4, requires_grad=True)
    out = focus_encoder(x, torch.randn(3, 100), [double_and_position], valid, shares=[1.0])
    out.sum().backward()
    assert torch.equal(x.grad.sum((1, 2)), torch.tensor([4 * (100.0 + 51), 4 * (100.0 + 16), 400]))


def test_nan_and_refusals() -> None:
    x, scores = torch.randn(1, 6, 2), torch.full((1, 6), torch.nan)
    assert torch.equal(focus_encoder(x, scores, [double_and_position], shares=[1.0]), x)
    with pytest.raises(ValueError, match="shares must have one for each of 1 layers, got 6"):
        focus_encoder(x, scores, [double_and_position])
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 2"):
        focus_encoder(x, scores, [double_and_position], shares=[2.0])
