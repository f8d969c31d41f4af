"""MCTF's weights and groups against the published formula, one token after the other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases.groups import check_in_a_model, groups_of, in_slots, tokens_of
from tokred.methods.mctf import MctfOptions, criteria_weight, mctf_plan
from tokred.patching import LayerAttention, ReductionCall

TAUS = (1.5, 20.0, 40.0)


def pair_weights(x: Tensor, attention: Tensor, size: Tensor, taus: tuple) -> Tensor:
    """W [N, N] of one item, in double precision."""
    unit = functional.normalize(x.double(), dim=-1)
    rare, small = 1 / attention.double(), 1 / size.double()
    rare, small = rare / rare.max(), small / small.max()
    similar = ((unit @ unit.T + 1) / 2) ** (1 / taus[0])
    informative = (rare[:, None] * rare) ** (1 / taus[1])
    return similar * informative * (small[:, None] * small) ** (1 / taus[2])


def expected_groups(weights: Tensor, r: int, num_prefix: int, bidirectional: bool) -> set:
    tokens = len(weights)
    even = [i for i in range(0, tokens, 2) if i >= num_prefix]
    odd = [i for i in range(1, tokens, 2) if i >= num_prefix]
    members = {token: {token} for token in range(tokens)}
    first = r // 2 if bidirectional else r
    for sources, destinations, count in ((even, odd, first), (odd, even, r - first)):
        destinations = [j for j in destinations if j in members]
        best = {i: max((weights[i, j].item(), -j) for j in destinations) for i in sources}
        for i in sorted(sources, key=lambda i: (-best[i][0], i))[:count]:
            members[-best[i][1]] |= members.pop(i)
    return in_slots(members)


def statistics(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    attention = torch.rand(batch, tokens, generator=generator) + 0.1
    return attention, torch.randint(1, 9, (batch, tokens), generator=generator).float()


@pytest.mark.parametrize(
    ("tokens", "num_prefix", "r", "bidirectional"),
    product((20, 27), (0, 1, 2), (1, 7), (True, False)),
)
def test_groups(tokens: int, num_prefix: int, r: int, bidirectional: bool) -> None:
    x, (attention, size) = tokens_of(2, tokens), statistics(2, tokens)
    weight = criteria_weight(attention, size, *TAUS)
    token_map, num_out = mctf_plan(x, weight, r, num_prefix, bidirectional)
    assert num_out == tokens - r
    for item in range(2):
        weights = pair_weights(x[item], attention[item], size[item], TAUS)
        expected = expected_groups(weights, r, num_prefix, bidirectional)
        assert groups_of(token_map[item]) == expected


def test_pooling_by_attention_and_size() -> None:
    x, (_, size) = tokens_of(1, 18), statistics(1, 18)
    q, k = torch.randn(2, 1, 2, 18, 8, generator=torch.Generator().manual_seed(0))
    weights = (q @ k.transpose(2, 3) * 0.4 + size.log()[:, None, None]).softmax(-1)
    attention = LayerAttention(
        {name: (t, lambda heads: heads) for name, t in zip("qk", (q, k), strict=True)}
    )
    attention.lse = (q @ k.transpose(2, 3) * 0.4 + size.log()[:, None, None]).logsumexp(-1)
    done = MctfOptions(r=6).plan(ReductionCall(x, 1, 2, 0, size, attention, 0.4))
    share = weights.mean((1, 2)) * size
    for slot in range(12):
        group = (done.token_map[0] == slot).nonzero()[:, 0]
        expected = (share[0, group, None] * x[0, group]).sum(0) / share[0, group].sum()
        torch.testing.assert_close(done.tokens[0, slot], expected, rtol=1e-4, atol=1e-5)
        assert done.size[0, slot] == size[0, group].sum()


def test_in_a_model() -> None:
    check_in_a_model("mctf", dict(r=0), dict(r=6), (37, 31, 25, 19))
    check_in_a_model("mctf", dict(r=0), {}, (37, 21, 11))
    check_in_a_model("mctf", dict(r=0), dict(min_tokens=30), (37, 30))


def test_refusals() -> None:
    for name, value in (("tau_sim", 0), ("tau_info", -1.0), ("min_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            MctfOptions(**{name: value})
