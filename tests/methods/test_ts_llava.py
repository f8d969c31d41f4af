"""TS-LLaVA's sampling and thumbnail against positions written out."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.ts_llava import even_positions, sample_tokens, thumbnail


def test_positions() -> None:
    assert even_positions(10, 4).tolist() == [0, 3, 6, 9]
    assert even_positions(7, 1).tolist() == [0]
    assert even_positions(5, 5).tolist() == [0, 1, 2, 3, 4]
    expected = [round(i * 999 / 36) for i in range(37)]
    assert even_positions(1000, 37).tolist() == expected


def test_sample_tokens() -> None:
    x = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    done = sample_tokens(x, 6)
    assert torch.equal(done.tokens, x.flatten(1, 2)[:, [0, 4, 8, 12, 16, 20]])
    kept = (done.token_map[1] >= 0).nonzero()[:, 0].tolist()
    assert kept == [0, 4, 8, 12, 16, 20]
    assert done.token_map[1, kept].tolist() == [0, 1, 2, 3, 4, 5]


def test_thumbnail() -> None:
    frames = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 3, 8, 12)
    image = thumbnail(frames, 2, 2)  # frames 0, 2, 5 and 7
    assert image.shape == (2, 3, 8, 12)
    for value, y, x in ((0, 0, 0), (2, 0, 6), (5, 4, 0), (7, 4, 6)):
        torch.testing.assert_close(
            image[:, :, y : y + 4, x : x + 6], torch.full((2, 3, 4, 6), float(value))
        )


def test_refusals() -> None:
    with pytest.raises(ValueError, match="count must be from 1 to 6, got 7"):
        sample_tokens(torch.zeros(1, 2, 3, 4), 7)
    with pytest.raises(ValueError, match="rows and columns must divide frames of 8 x 9"):
        thumbnail(torch.zeros(1, 4, 3, 8, 9), 2, 2)
    with pytest.raises(ValueError, match="count must be from 1 to 3, got 4"):
        thumbnail(torch.zeros(1, 3, 3, 8, 8), 2, 2)
