"""KTV's keyframes and scores against loops over frames and tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from tokred.methods.ktv import keyframes, select_tokens, token_scores


def test_keyframes_of_separate_scenes() -> None:
    """Three scenes far apart: the frame nearest to the mean of each."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    features = torch.eye(8)[scenes] * 20 + torch.randn(2, 12, 8, generator=generator)
    found = keyframes(features, 3)
    for item in range(2):
        expected = []
        for scene in range(3):
            frames = (scenes == scene).nonzero()[:, 0]
            mean = features[item, frames].mean(0)
            expected.append(frames[(features[item, frames] - mean).norm(dim=1).argmin()].item())
        assert found[item].tolist() == expected


def test_as_many_keyframes_as_frames() -> None:
    assert keyframes(tokens_of(1, 5), 5).tolist() == [[0, 1, 2, 3, 4]]


def test_duplicate_frames() -> None:
    found = keyframes(torch.ones(1, 6, 4), 3)
    assert len(set(found[0].tolist())) == 3


def test_scores() -> None:
    x = tokens_of(2, 3 * 8).view(2, 3, 8, 16)
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    scores = token_scores(x, logits)
    for item in range(2):
        for frame in range(3):
            unit = functional.normalize(x[item, frame], dim=-1)
            redundancy = ((unit @ unit.T).sum(1) - 1) / 7
            parts = []
            for value in (logits[item, frame], redundancy):
                parts.append((value - value.min()) / (value.max() - value.min()))
            expected = 0.2 * parts[0] + 0.8 * (1 - parts[1])
            torch.testing.assert_close(scores[item, frame], expected, rtol=1e-4, atol=1e-5)


def test_budgets() -> None:
    x = tokens_of(2, 3 * 8).view(2, 3, 8, 16)
    scores = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(2))
    done = select_tokens(x, scores, [5, 0, 2])
    for item in range(2):
        kept = [
            (frame, t)
            for frame, budget in ((0, 5), (2, 2))
            for t in sorted(scores[item, frame].argsort(descending=True)[:budget].tolist())
        ]
        assert torch.equal(done.tokens[item], torch.stack([x[item, f, t] for f, t in kept]))
        expected = torch.full((24,), -1)
        expected[[f * 8 + t for f, t in kept]] = torch.arange(7)
        assert done.token_map[item].tolist() == expected.tolist()


def test_refusals() -> None:
    x = torch.zeros(1, 2, 4, 3)
    for budgets in ([1], [1, 5], [-1, 1]):
        with pytest.raises(ValueError, match="budgets must be 2 numbers from 0 to 4"):
            select_tokens(x, torch.zeros(1, 2, 4), budgets)
    with pytest.raises(ValueError, match="count must be from 1 to 2, got 3"):
        keyframes(torch.zeros(1, 2, 4), 3)
