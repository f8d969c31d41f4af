"""ToMe's step against the published formula, written out in plain torch."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tokred.methods.tome import tome_plan, tome_step


def bipartite(metric: Tensor, r: int, class_token: bool, distill_token: bool) -> tuple:
    """(unmerged, merged, partner) of the sets of even and odd tokens, by a full argsort."""
    metric = functional.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    if class_token:
        scores[:, 0] = -torch.inf
    if distill_token:
        scores[:, :, 0] = -torch.inf
    best, partner = scores.max(-1)
    edges = best.argsort(-1, descending=True)
    unmerged, merged = edges[:, r:], edges[:, :r]
    if class_token:
        unmerged = unmerged.sort(-1).values
    return unmerged, merged, partner.gather(1, merged)


def reduced(x: Tensor, plan: tuple, distill_token: bool) -> Tensor:
    """Sums of x [B, N, C] over the groups, survivors first, then destinations."""
    unmerged, merged, partner = (index[..., None].expand(-1, -1, x.shape[-1]) for index in plan)
    sources, destinations = x[:, ::2], x[:, 1::2]
    kept = sources.gather(1, unmerged)
    sums = destinations.scatter_add(1, partner, sources.gather(1, merged))
    if distill_token:
        return torch.cat([kept[:, :1], sums[:, :1], kept[:, 1:], sums[:, 1:]], 1)
    return torch.cat([kept, sums], 1)


@pytest.mark.parametrize(("tokens", "num_prefix", "r"), product((24, 37), (0, 1, 2), (1, 7, 1000)))
def test_step(tokens: int, num_prefix: int, r: int) -> None:
    generator = torch.Generator().manual_seed(tokens + num_prefix)
    x = torch.randn(3, tokens, 20, generator=generator)
    metric = torch.randn(3, tokens, 8, generator=generator)
    size = torch.randint(1, 6, (3, tokens), generator=generator).float()
    merged = min(r, (tokens - num_prefix) // 2)
    plan = bipartite(metric, merged, num_prefix > 0, num_prefix > 1)
    total = reduced(size[..., None], plan, num_prefix > 1)
    expected = reduced(x * size[..., None], plan, num_prefix > 1) / total

    y, sizes, token_map = tome_step(x, metric, r, size, num_prefix)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(sizes, total[..., 0])
    assert y.shape == (3, tokens - merged, 20)
    assert token_map.shape == (3, tokens)
    assert torch.equal(token_map[:, :num_prefix], torch.arange(num_prefix).int().expand(3, -1))
    counted = torch.zeros_like(sizes).scatter_add(1, token_map.long(), size)
    assert torch.equal(counted, sizes)


def test_without_sizes_every_token_counts_once() -> None:
    x = torch.randn(2, 15, 6, generator=torch.Generator().manual_seed(0))
    y, sizes, _ = tome_step(x, x, 4, num_prefix=1)
    other, same, _ = tome_step(x, x, 4, torch.ones(2, 15), 1)
    assert torch.equal(y, other)
    assert torch.equal(sizes, same)


def test_nothing_to_merge() -> None:
    x = torch.randn(2, 5, 6)
    assert tome_plan(x, 5, 3) is None
    assert tome_plan(x, 0, 0) is None
    y, sizes, token_map = tome_step(x, x, 3, num_prefix=5)
    assert torch.equal(y, x)
    assert torch.equal(sizes, torch.ones(2, 5))
    assert torch.equal(token_map, torch.arange(5).int().expand(2, -1))


def test_share_of_the_tokens() -> None:
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    assert tome_step(x, x, 0.3)[0].shape == (1, 28, 6)
