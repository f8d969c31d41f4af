"""FlexAttention's BlockMask, and the pair of tensors it stores, as block masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import tokred
from cases.inputs import generator

pytestmark = pytest.mark.usefixtures("one_thread")

attention, blocks = tokred.biased_attention, tokred.block_sparse_attention


def flex(rule: Callable) -> BlockMask:
    return create_block_mask(rule, None, None, 200, 200, device="cpu", BLOCK_SIZE=(64, 32))


def test_flex_attention_masks() -> None:
    """A BlockMask, and the pair it stores, are the bool mask of their blocks."""
    q = torch.randn(2, 4, 200, 8, generator=generator())
    k = torch.randn(2, 2, 200, 8, generator=generator(1))
    grid = torch.rand(2, 4, 4, 7, generator=generator(2)) < 0.5
    number = grid.sum(-1).int()
    order = grid.int().argsort(dim=-1, descending=True, stable=True).int()
    expected = blocks(q, k, k, grid, 64, 32)
    whole = BlockMask.from_kv_blocks(number, order, BLOCK_SIZE=(64, 32), seq_lengths=(200, 200))
    half = number // 2
    rest = (grid & (grid.cumsum(-1) > half[..., None])).int()
    split = BlockMask.from_kv_blocks(
        half, order, rest.sum(-1).int(), rest.argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=(64, 32), seq_lengths=(200, 200),
    )  # fmt: skip
    for mask, sizes in ((whole, ()), (split, ()), ((number, order), (64, 32))):
        for actual, want in zip(blocks(q, k, k, mask, *sizes), expected, strict=True):
            assert torch.equal(actual, want)
    causal = flex(lambda b, h, i, j: i >= j)
    out, _ = blocks(q, k, k, causal, causal=True)
    torch.testing.assert_close(out, attention(q, k, k, causal=True)[0])


def test_flex_attention_masks_that_blocks_cannot_express() -> None:
    q, k = torch.zeros(1, 1, 200, 8), torch.zeros(1, 1, 200, 8)
    window = flex(lambda b, h, i, j: (i >= j) & (i - j < 50))
    for options in ({}, {"causal": True}):
        with pytest.raises(ValueError, match="mask_mod that hides part"):
            blocks(q, k, k, window, **options)
    with pytest.raises(ValueError, match="mask_mod that hides part"):
        blocks(q, k, k, flex(lambda b, h, i, j: i >= j))
    with pytest.raises(ValueError, match=r"must be the BlockMask's \(64, 32\)"):
        blocks(q, k, k, window, 64, 64)
    with pytest.raises(ValueError, match="block_q and block_k must be given"):
        blocks(q, k, k, torch.ones(1, 1, 4, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="a bool tensor, a pair"):
        blocks(q, k, k, "causal", 64, 64)
