"""ToFu's two ways to reduce against the published formulas, written out in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.groups import check_in_a_model, tokens_of
from tokred.methods.tofu import TofuOptions
from tokred.patching import LayerAttention, ReductionCall


def links(metric: Tensor, r: int) -> dict[int, int]:
    """source -> destination of one item [N, C], even tokens being sources."""
    unit = functional.normalize(metric.double(), dim=-1)
    best, partner = (unit[0::2] @ unit[1::2].T).max(1)
    return {2 * i: 2 * int(partner[i]) + 1 for i in best.argsort(descending=True)[:r].tolist()}


def reduction(x: Tensor, keys: Tensor, size: Tensor | None, layer: int, r: int) -> object:
    attention = LayerAttention({"k": (keys, lambda heads: heads)})
    call = ReductionCall(x, layer, 2, 0, size, attention)
    return TofuOptions(r=r).plan(call)


@pytest.mark.parametrize("tokens", (16, 21))
def test_early_layers_drop_the_sources(tokens: int) -> None:
    x, keys = tokens_of(2, tokens), tokens_of(4, tokens, 8).view(2, 2, tokens, 8)
    token_map, num_out = reduction(x, keys, None, 0, 5)
    assert num_out == tokens - 5
    for item in range(2):
        dropped = (token_map[item] < 0).nonzero()[:, 0].tolist()
        assert dropped == sorted(links(keys[item].mean(0), 5))
        left = token_map[item][token_map[item] >= 0]
        assert torch.equal(left.sort().values, torch.arange(num_out).int())


@pytest.mark.parametrize("with_sizes", (False, True))
def test_later_layers_keep_the_largest_norm(with_sizes: bool) -> None:
    tokens, r = 21, 6
    x, keys = tokens_of(2, tokens), tokens_of(4, tokens, 8).view(2, 2, tokens, 8)
    size = torch.arange(1.0, 43).view(2, 21) if with_sizes else None
    done = reduction(x, keys, size, 1, r)
    for item in range(2):
        members = {token: [token] for token in range(tokens)}
        for source, destination in links(keys[item].mean(0), r).items():
            members[destination] += members.pop(source)
        for destination, group in members.items():
            rows = x[item, group].double()
            total = rows.sum(0)
            expected = total / total.norm() * rows.norm(dim=1).max()
            slot = done.token_map[item, destination]
            torch.testing.assert_close(done.tokens[item, slot], expected.float())
            count = len(group) if size is None else size[item, group].sum().item()
            assert done.size[item, slot] == count


def test_in_a_model() -> None:
    check_in_a_model("tofu", dict(r=0), dict(r=4), (37, 33, 29, 25))
    check_in_a_model("tofu", dict(r=0), dict(r=4, prune_layers=3), (37, 33, 29, 25))


def test_options() -> None:
    with pytest.raises(ValueError, match="prune_layers must be at least 0, got -1"):
        TofuOptions(prune_layers=-1)
