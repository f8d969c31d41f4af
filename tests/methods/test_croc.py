"""Croc's assignment against every permutation, and its replacement."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from cases.groups import tokens_of
from tokred.methods.croc import choose_patches, nearest_tokens, replace_patches


def test_the_assignment_is_the_best_of_all() -> None:
    patches, tokens = tokens_of(3, 4, 6), tokens_of(1, 6, 6)[0]
    distance = torch.cdist(patches, tokens.expand(3, -1, -1))
    index = nearest_tokens(patches, tokens)
    for item in range(3):
        best = min(
            sum(distance[item, i, j].item() for i, j in enumerate(way))
            for way in permutations(range(6), 4)
        )
        assert distance[item, range(4), index[item].long()].sum().item() == pytest.approx(best)
        assert len(set(index[item].tolist())) == 4


def test_what_the_code_does() -> None:
    patches, tokens = tokens_of(2, 9, 6), tokens_of(1, 4, 6)[0]
    expected = torch.cdist(patches, tokens.expand(2, -1, -1)).argmin(2)
    assert nearest_tokens(patches, tokens, True).tolist() == expected.tolist()


@pytest.mark.parametrize("compat", (False, True))
def test_replacement(compat: bool) -> None:
    x, tokens = tokens_of(2, 12, 6), tokens_of(1, 20, 6)[0].requires_grad_()
    chosen = choose_patches(2, 12, generator=torch.Generator().manual_seed(0))
    assert chosen.shape == (2, 9) and (chosen.diff(dim=1) > 0).all()
    y, index = replace_patches(x, tokens, chosen, compat)
    for item in range(2):
        for t in range(12):
            place = (chosen[item] == t).nonzero()
            row = tokens[index[item, place[0, 0]]] if len(place) else x[item, t]
            assert torch.equal(y[item, t], row)
    y.sum().backward()
    assert tokens.grad[:, 0].sum() == 18


def test_refusals() -> None:
    with pytest.raises(ValueError, match="tokens must be at least as many as the 4 patches"):
        nearest_tokens(tokens_of(1, 4), tokens_of(1, 3)[0])
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 2"):
        choose_patches(1, 4, 2)
