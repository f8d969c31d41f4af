"""The means of units against a loop over their tokens."""

from __future__ import annotations

import pytest
import torch

import tokred
from tokred.methods.code_tokens import merge_units, unit_map

IDS = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, -1, -1, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]])
UNITS = ([[0], [1, 2], [3], [4, 5, 6], [7], [8], [9]], [[*range(10)]])


@pytest.mark.parametrize("weighted", (False, True))
def test_means_of_units(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(2, 10, 4, generator=generator)
    weight = torch.rand(2, 10, generator=generator) + 0.1 if weighted else None
    y, lengths, token_map = merge_units(h, IDS, weight)
    assert lengths.tolist() == [7, 1]
    for item, units in enumerate(UNITS):
        for slot, unit in enumerate(units):
            w = torch.ones(len(unit)) if weight is None else weight[item, unit]
            expected = (w[:, None] * h[item, unit]).sum(0) / w.sum()
            torch.testing.assert_close(y[item, slot], expected)
        assert (y[item, len(units) :] == 0).all()
    assert torch.equal(tokred.unmerge(y, token_map)[0, 5], y[0, 3])


def test_capacity() -> None:
    y, lengths, _ = merge_units(torch.ones(2, 10, 3), IDS, capacity=4)
    assert y.shape == (2, 4, 3) and lengths.tolist() == [4, 1]


def test_nothing() -> None:
    token_map, lengths = unit_map(torch.zeros(2, 0, dtype=torch.int64))
    assert token_map.shape == (2, 0) and lengths.tolist() == [0, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"word_ids must be integers \[B, N\], got \[10\]"):
        unit_map(IDS[0])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        unit_map(IDS.float())
