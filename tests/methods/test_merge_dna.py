"""Local matching against the dense matrix with everything outside the band masked."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tokred
from cases.groups import check_in_a_model, groups_of, in_slots, tokens_of
from tokred.methods.merge_dna import MergeDnaOptions, local_plan


def expected_groups(metric: Tensor, r: int, window: int, num_prefix: int, seen: Tensor) -> set:
    unit = functional.normalize(metric[num_prefix:].double(), dim=-1)
    pairs = len(unit) // 2
    even, odd = unit[0 : 2 * pairs : 2], unit[1 : 2 * pairs : 2]
    place = torch.arange(pairs)
    near = (place[:, None] - place).abs() <= window
    may = seen[num_prefix:][: 2 * pairs].view(pairs, 2)
    allowed = near & may[:, :1] & may[:, 1]
    best, partner = (even @ odd.T).masked_fill(~allowed, -torch.inf).max(1)
    members = {token: {token} for token in range(len(metric))}
    for i in best.argsort(descending=True)[:r].tolist():
        if best[i] > -torch.inf:
            source = num_prefix + 2 * i
            members[num_prefix + 2 * partner[i].item() + 1] |= members.pop(source)
    return in_slots(members)


@pytest.mark.parametrize(
    ("tokens", "num_prefix", "r", "window"), product((20, 31), (0, 1), (1, 7), (0, 2, 40))
)
def test_groups(tokens: int, num_prefix: int, r: int, window: int) -> None:
    metric = tokens_of(3, tokens, 4)  # few channels: many similarities are negative
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    for seen in (None, mask):
        token_map, num_out = local_plan(metric, r, window, num_prefix, seen)
        assert num_out == tokens - r
        for item in range(3):
            every = torch.ones(tokens, dtype=torch.bool) if seen is None else seen[item]
            expected = expected_groups(metric[item], r, window, num_prefix, every)
            assert groups_of(token_map[item]) == expected


def test_maps_of_layers_give_every_base_its_word() -> None:
    x, total = tokens_of(2, 32), None
    for r in (10, 5):
        token_map, num_out = local_plan(x, r, 1)
        total = token_map if total is None else tokred.compose(token_map, total)
        x, _ = tokred.merge(x, token_map, num_out)
    assert x.shape == (2, 17, 16) and total.shape == (2, 32)
    restored = tokred.unmerge(x, total)
    assert torch.equal(restored[0, 5], x[0, total[0, 5]])


def test_in_a_model() -> None:
    check_in_a_model("merge_dna", dict(r=0), dict(r=5, window=1), (37, 32, 27, 22))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="r must be from 0 to the 4 pairs, got 5"):
        local_plan(tokens_of(1, 9), 5, 1)
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        MergeDnaOptions(window=-1)
