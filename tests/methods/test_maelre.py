"""MAELRE's two attentions against sums over the keys, and its stages."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tokred.methods.maelre import attention, linear_attention, merge_stage


@pytest.mark.parametrize("with_sizes", (False, True))
@pytest.mark.parametrize("keys", (6, 8, 9, 30))
def test_attention(keys: int, with_sizes: bool) -> None:
    generator = torch.Generator().manual_seed(keys)
    q, k, v = torch.randn(3, 2, 3, keys, 8, generator=generator)
    size = torch.randint(1, 5, (2, keys), generator=generator).float() if with_sizes else None
    weight = torch.ones(2, keys) if size is None else size
    if keys <= 8:
        pairs = torch.exp(q @ k.transpose(2, 3) * 8**-0.5)
    else:
        pairs = (functional.elu(q) + 1) @ (functional.elu(k) + 1).transpose(2, 3)
    pairs = pairs * weight[:, None, None]
    expected = pairs / pairs.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attention(q, k, v, size), expected, rtol=1e-4, atol=1e-5)


def test_sizes_stand_for_repeated_keys() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[1.0, 3, 1, 2, 1]])
    often = size[0].long()
    repeated = (x.repeat_interleave(often, 2) for x in (k, v))
    torch.testing.assert_close(linear_attention(q, k, v, size), linear_attention(q, *repeated))


def test_stages() -> None:
    x, size = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)), None
    for expected in (20, 10, 5):
        x, size, _ = merge_stage(x, 0.5, size)
        assert x.shape == (2, expected, 6) and torch.equal(size.sum(1), torch.full((2,), 40.0))
