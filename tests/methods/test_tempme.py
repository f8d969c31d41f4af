"""TempMe's joining and merging against the published steps, clip by clip."""

from __future__ import annotations

import pytest
import torch

from cases.dense_tome import mean_of, tome_groups
from cases.groups import tokens_of
from tokred.methods.tempme import join_frames, merge_frames, merge_within


@pytest.mark.parametrize(("frames", "num_prefix"), ((2, 1), (3, 1), (2, 2), (1, 0)))
def test_merge_frames(frames: int, num_prefix: int) -> None:
    x = tokens_of(2, 6 * 9).view(2, 6, 9, 16)
    size = torch.randint(1, 5, (2, 6, 9), generator=torch.Generator().manual_seed(0)).float()
    done = merge_frames(x, frames, num_prefix, size)
    merged = min(int(frames * 9 * 0.3), (9 - num_prefix) * frames // 2)
    left = frames * 9 - merged
    assert done.tokens.shape == (2, 6 // frames, left, 16)
    for item in range(2):
        for clip in range(6 // frames):
            group = range(clip * frames, (clip + 1) * frames)
            # Class tokens of all frames first; positions count through, as in ToMe.
            rows = [(f, t) for f in group for t in range(num_prefix)]
            rows += [(f, t) for f in group for t in range(num_prefix, 9)]
            joined = torch.stack([x[item, f, t] for f, t in rows])
            sizes = torch.stack([size[item, f, t] for f, t in rows])
            for members in tome_groups(joined, merged, num_prefix * frames):
                flat = [rows[m][0] * 9 + rows[m][1] for m in members]
                slots = done.token_map[item, flat]
                assert len(slots.unique()) == 1
                slot = slots[0] - clip * left
                expected = mean_of(joined, members, sizes)
                torch.testing.assert_close(done.tokens[item, clip, slot], expected)
                assert done.size[item, slots[0]] == sizes[members].sum()
            first = done.token_map[item].view(6, 9)[list(group), :num_prefix].flatten()
            assert first.tolist() == list(range(clip * left, clip * left + num_prefix * frames))


def test_merge_within() -> None:
    x, keys = tokens_of(2, 40).view(2, 2, 20, 16), tokens_of(2, 40, 8).view(2, 2, 20, 8)
    size = torch.ones(2, 2, 20)
    done = merge_within(x, keys, 3, size, 0.2)
    assert done.tokens.shape == (2, 2, 16, 16)
    for item in range(2):
        for clip in range(2):
            for members in tome_groups(keys[item, clip], 4, 3):
                slot = done.token_map[item, clip * 20 + members[0]] - clip * 16
                expected = mean_of(x[item, clip], members)
                torch.testing.assert_close(done.tokens[item, clip, slot], expected)


def test_from_twelve_frames_to_one_clip() -> None:
    x = tokens_of(1, 12 * 20).view(1, 12, 20, 16)
    size, num_prefix = None, 1
    for frames in (2, 2, 3):
        done = merge_frames(x, frames, num_prefix, size)
        x, num_prefix = done.tokens, num_prefix * frames
        done = merge_within(x, x, num_prefix, done.size.view(x.shape[:3]))
        x, size = done.tokens, done.size.view(done.tokens.shape[:3])
    assert x.shape[:2] == (1, 1) and num_prefix == 12 and size.sum() == 240
    assert torch.equal(size[0, 0, :12], torch.ones(12))


def test_refusals() -> None:
    x = tokens_of(2, 54).view(2, 6, 9, 16)
    with pytest.raises(ValueError, match="frames must divide the 6 frames of x, got 4"):
        join_frames(x, 4)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\), got 1.0"):
        merge_frames(x, 2, share=1.0)
    with pytest.raises(ValueError, match=r"x must be a tensor \[B, frames, N, C\]"):
        merge_frames(x[0], 2)
