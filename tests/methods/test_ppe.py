"""PPE's clusters, positions and angles against loops over the members."""

from __future__ import annotations

import math

import pytest
import torch

from cases.dense_dpc import dpc_knn
from cases.groups import tokens_of
from tokred.methods.ppe import compress, last_members, rotary_angles


def positions_of(batch: int, height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    t = torch.full_like(y, 7)
    return torch.stack([t, y, x]).flatten(1).expand(batch, -1, -1)


@pytest.mark.parametrize(("ratio", "k"), ((0.3, 2), (0.1, 8), (1.0, 1)))
def test_compress(ratio: float, k: int) -> None:
    x, positions = tokens_of(2, 24), positions_of(2, 4, 6)
    done = compress(x, positions, ratio, k)
    clusters = math.ceil(24 * ratio)
    neighbours = 5 if clusters >= 5 else min(3, max(clusters // 2, 1))
    assert done.tokens.shape == (2, clusters, 16) and done.positions.shape == (2, 3 * k, clusters)
    for item in range(2):
        _, assignment = dpc_knn(x[item], clusters, neighbours)
        assert torch.equal(done.token_map[item], assignment.int())
        for cluster in range(clusters):
            members = (assignment == cluster).nonzero()[:, 0].tolist()
            torch.testing.assert_close(done.tokens[item, cluster], x[item, members].mean(0))
            last = members
            while len(last) < k:
                last = members + last
            last = last[-k:]
            expected = [positions[item, kind, t].item() for kind in range(3) for t in last]
            assert done.positions[item, :, cluster].tolist() == expected


def test_last_members() -> None:
    assignment = torch.tensor([[1, -1, 0, 1, 1, -1, 0]], dtype=torch.int32)
    assert last_members(assignment, 2, 2).tolist() == [[[2, 6], [3, 4]]]
    assert last_members(assignment, 2, 3).tolist() == [[[6, 2, 6], [0, 3, 4]]]
    assert last_members(assignment, 3, 1).shape == (1, 3, 1)


def test_cascade() -> None:
    """A second compression keeps the first position of the clusters it joins."""
    x, positions = tokens_of(1, 24), positions_of(1, 4, 6)
    first = compress(x, positions, 0.5, 2)
    second = compress(first.tokens, first.positions, 0.5, 3)
    assert second.tokens.shape == (1, 6, 16) and second.positions.shape == (1, 9, 6)
    members = last_members(second.token_map, 6, 3)
    assert (
        second.positions[0, 3].tolist() == first.positions[0, 2, members[0, :, 0].long()].tolist()
    )


def test_angles() -> None:
    positions = torch.arange(12).view(1, 6, 2)
    frequency = 1 / 10 ** torch.arange(8.0)
    angles = rotary_angles(positions, frequency, [1, 2, 1, 1, 1, 1, 1])
    rows = [0, 1, 1, 2, 3, 4, 5, 0]
    for token in range(2):
        expected = positions[0, rows, token] * frequency
        torch.testing.assert_close(angles[0, token], expected)


def test_refusals() -> None:
    x = tokens_of(1, 6)
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        compress(x, positions_of(1, 2, 3), 0)
    with pytest.raises(ValueError, match=r"positions must be \[1, 3 or a multiple, 6\]"):
        compress(x, positions_of(1, 2, 2), 0.5)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        compress(x, positions_of(1, 2, 3), 0.5, 0)
    with pytest.raises(ValueError, match="sections must add up to 4 frequencies"):
        rotary_angles(torch.zeros(1, 3, 2), torch.ones(4), [1, 2])
