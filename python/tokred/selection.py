"""Choosing keys by score, with sinks and locals outside the budget, in rows with padding; the
tokens and masks of chosen blocks; and putting chosen tokens back."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import topk_with_counts
from .ops.symbolic import smaller


def ends(visible: Tensor, num_sinks: int, num_locals: int) -> Tensor:
    """The first num_sinks and the last num_locals visible entries of every row.

    Args:
        visible: bool [..., N], whatever the padding: left, right or both.

    Returns:
        bool [..., N].
    """
    rank = visible.cumsum(-1)
    last = visible.sum(-1, keepdim=True)
    return visible & ((rank <= num_sinks) | (rank > last - num_locals))


def choose(
    scores: Tensor,
    k: int,
    num_sinks: int = 0,
    num_locals: int = 0,
    visible: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best entries of every row between the sinks and the locals, and these.

    Args:
        scores: [..., N] float32, float16 or bfloat16, at most three leading dimensions. Entries
            that are not visible must be -inf.
        k: entries chosen by score.
        num_sinks, num_locals: first and last visible entries, chosen in any case.
        visible: bool [..., N], sizes of 1 broadcast; None where rows have no padding.
        lengths: int32 [...], entries of each row that take part, sizes of 1 broadcast.

    Returns:
        indices int32 [..., min(num_sinks + k + num_locals, N)], ascending, -1 behind the last, and
        counts int32 [...].
    """
    places = smaller(num_sinks + k + num_locals, scores.shape[-1])
    if visible is None:
        _, indices, counts = topk_with_counts(
            scores, places, lengths, "position", num_sinks=num_sinks, num_locals=num_locals
        )
        return indices, counts
    if lengths is not None:
        place = torch.arange(scores.shape[-1], device=scores.device)
        visible = visible & (place < lengths[..., None])
    forced = ends(visible, num_sinks, num_locals)
    _, indices, counts = topk_with_counts(scores, places, lengths, "position", must_keep=forced)
    return indices, counts


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
    listed = blocks.masked_fill(blocks < 0, num_blocks).long()
    return spare.scatter_(-1, listed, True)[..., :num_blocks]


def scatter_back(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
    """x with y in the places that are listed.

    Args:
        x: [B, N, C]. y: [B, K, C]. indices: i32 [B, K], each at most once; -1 takes nothing.

    Returns:
        [B, N, C]; differentiable in x and y.
    """
    batch, tokens, channels = x.shape
    inside = (indices >= 0) & (indices < tokens)
    place = torch.where(inside, indices, tokens).long()[..., None].expand(-1, -1, channels)
    spare = torch.cat([x, x.new_zeros(batch, 1, channels)], 1)
    return spare.scatter(1, place, y.to(x.dtype))[:, :-1]
