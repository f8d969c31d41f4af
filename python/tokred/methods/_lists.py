"""What the attention methods share: key lists from blocks, block masks from lists, empty slots."""

from __future__ import annotations

import torch
from torch import Tensor


def expand_blocks(blocks: Tensor, block_size: int, num_keys: int, first: int = 0) -> Tensor:
    """The tokens of listed blocks.

    Args:
        blocks: i32 [..., M], block numbers, -1 for none.
        block_size: tokens a block; block 0 starts at token `first`.
        num_keys: tokens from here on do not exist.

    Returns:
        i32 [..., M * block_size], -1 where there is no such block or token.
    """
    inside = torch.arange(block_size, dtype=torch.int32, device=blocks.device)
    tokens = first + blocks[..., None] * block_size + inside
    tokens = torch.where((blocks[..., None] >= 0) & (tokens < num_keys), tokens, -1)
    return tokens.flatten(-2)


def block_mask(blocks: Tensor, num_blocks: int) -> Tensor:
    """bool [..., num_blocks]: which blocks i32 [..., M] lists; -1 lists none."""
    spare = torch.zeros(*blocks.shape[:-1], num_blocks + 1, dtype=torch.bool, device=blocks.device)
    listed = torch.where(blocks >= 0, blocks, num_blocks).long()
    return spare.scatter(-1, listed, True)[..., :num_blocks]


def range_list(first: Tensor, end: Tensor, width: int) -> Tensor:
    """The tokens first .. end - 1 of every row, at most `width` of them, -1 behind them.

    Args:
        first, end: integers [...].

    Returns:
        i32 [..., width].
    """
    tokens = first[..., None] + torch.arange(width, device=first.device)
    return torch.where(tokens < end[..., None], tokens, -1).to(torch.int32)


def key_lengths(k: Tensor, lengths: Tensor | None) -> Tensor:
    """i32 [B]: the number of keys of each row; all of k [B, Hkv, N, D] where not given."""
    if lengths is not None:
        return lengths.to(torch.int32)
    return torch.full((k.shape[0],), k.shape[2], dtype=torch.int32, device=k.device)
