"""DiffRate's pruning and merging against the published rule, one token after the other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from cases.groups import check_in_a_model, groups_of, in_slots, tokens_of
from tokred.methods.diffrate import DiffrateOptions, diffrate_plan


@pytest.mark.parametrize(
    ("tokens", "num_prefix", "drop", "merge"), product((18, 25), (0, 1, 2), (0, 3), (0, 5))
)
def test_groups(tokens: int, num_prefix: int, drop: int, merge: int) -> None:
    x = tokens_of(2, tokens)
    importance = torch.rand(2, tokens, generator=torch.Generator().manual_seed(tokens))
    token_map, num_out = diffrate_plan(x, importance, drop, merge, num_prefix)
    assert num_out == tokens - drop - merge
    for item in range(2):
        unit = functional.normalize(x[item].double(), dim=-1)
        ranked = sorted(range(num_prefix, tokens), key=lambda i: -importance[item, i].item())
        kept = ranked[: len(ranked) - drop - merge]
        members = {token: {token} for token in [*range(num_prefix), *kept]}
        for i in ranked[len(kept) : len(kept) + merge]:
            members[max(kept, key=lambda j: (unit[i] @ unit[j]).item())].add(i)
        assert groups_of(token_map[item]) == in_slots(members)


def test_in_a_model() -> None:
    check_in_a_model("diffrate", dict(r=0), dict(r=[5, 0, 6], drop=2), (37, 32, 26))
    check_in_a_model("diffrate", dict(r=0), dict(r=5), (37, 32, 27, 22))
    check_in_a_model(
        "diffrate", dict(r=0), dict(r=5), (36, 31, 26, 21), class_token=False, global_pool="avg"
    )


def test_refusals() -> None:
    x = tokens_of(1, 9)
    for drop, merge in ((5, 4), (-1, 0), (9, 0)):
        with pytest.raises(ValueError, match="must be at least 0 and leave one of 9 tokens"):
            diffrate_plan(x, torch.rand(1, 9), drop, merge)
    for drop in (0.5, 7):
        with pytest.raises(ValueError, match="drop must be ints, at most r = 4"):
            DiffrateOptions(r=4, drop=drop).layers(2)
