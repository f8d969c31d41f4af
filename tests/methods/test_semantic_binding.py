"""The merged embeddings of a prompt against the published sums."""

from __future__ import annotations

import pytest
import torch

from tokred.methods.semantic_binding import bind


def test_sums() -> None:
    e = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    bound = bind(e, [([3, 4], [2]), ([7], [5, 6])])
    expected = e.clone()
    expected[:, 3] = 1.1 * (e[:, 3] + e[:, 4]) + 1.2 * e[:, 2]
    expected[:, 7] = 1.1 * e[:, 7] + 1.2 * (e[:, 5] + e[:, 6])
    expected[:, [2, 4, 5, 6]] = 0
    torch.testing.assert_close(bound, expected)
    assert torch.equal(bind(e, []), e)


def test_refusals() -> None:
    e = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="groups must have a token for the noun"):
        bind(e, [([], [1])])
    for groups in ([([4], [])], [([-1], [])], [([0], [0])], [([0], []), ([1], [0])]):
        with pytest.raises(ValueError, match="positions from 0 to 3, each once"):
            bind(e, groups)
