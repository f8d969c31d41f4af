"""STORM's three reductions against means and choices written out."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.methods._video import VideoTokens
from tokred.methods.storm import pool_frames, pool_space, sample_frames


def video(frames: int, tokens: int) -> torch.Tensor:
    return torch.randn(2, frames, tokens, 4, generator=torch.Generator().manual_seed(frames))


def check_map(x: torch.Tensor, done: VideoTokens) -> None:
    """The tokens are the plain means by the map."""
    y, _ = tokred.merge(x.flatten(1, 2), done.token_map, done.tokens.shape[1])
    torch.testing.assert_close(done.tokens, y)


@pytest.mark.parametrize(("frames", "every"), ((6, 2), (7, 3), (3, 1), (2, 5)))
def test_pool_frames(frames: int, every: int) -> None:
    x = video(frames, 5)
    done = pool_frames(x, every)
    expected = [x[:, start : start + every].mean(1) for start in range(0, frames, every)]
    torch.testing.assert_close(done.tokens, torch.cat(expected, 1))
    check_map(x, done)


def test_pool_space() -> None:
    x = video(3, 24)
    done = pool_space(x, (4, 6))
    expected = x.view(2, 3, 2, 2, 3, 2, 4).mean((3, 5))
    torch.testing.assert_close(done.tokens, expected.reshape(2, 18, 4))
    check_map(x, done)


def test_sample_frames() -> None:
    x = video(5, 3)
    done = sample_frames(x, 2)
    assert torch.equal(done.tokens, torch.cat([x[:, 0], x[:, 2], x[:, 4]], 1))
    assert done.token_map[0].tolist() == [0, 1, 2, -1, -1, -1, 3, 4, 5, -1, -1, -1, 6, 7, 8]
    check_map(x, done)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        pool_frames(video(2, 2), 0)
    with pytest.raises(ValueError, match="side must divide the grid of 3 x 4, got 2"):
        pool_space(video(2, 12), (3, 4))
    with pytest.raises(ValueError, match="all frames with as many tokens, got list"):
        sample_frames([video(1, 2), video(1, 3)], 2)
