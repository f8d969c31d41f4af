"""Padded batches in layers that reduce their tokens: each row by itself, without its padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .reduction_call import LayerAttention


@dataclass(frozen=True)
class Padding:
    """Which of the N tokens of each row there are.

    lengths: how many, by row. positions: i64 [B, N], where in the row those are, in their order,
    then the others; None where they come first.
    """

    lengths: tuple[int, ...]
    positions: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor) -> Padding:
        """From a bool mask [B, N], False for padding, which is copied to the host once."""
        first = (mask[:, 1:] <= mask[:, :-1]).all().int().expand(1)
        *lengths, comes_first = torch.cat([mask.sum(1).int(), first]).tolist()
        if comes_first:
            return cls(tuple(lengths))
        return cls(tuple(lengths), (~mask).int().argsort(dim=1, stable=True))

    def row(self, x: Tensor, row: int, dim: int) -> Tensor:
        """The tokens of one row, a batch of 1, of x [B, ..] with its tokens in `dim`."""
        length = self.lengths[row]
        if self.positions is None:
            return x[row : row + 1].narrow(dim, 0, length)
        return x[row : row + 1].index_select(dim, self.positions[row, :length])

    def attention(self, attention: LayerAttention, row: int) -> LayerAttention:
        """What the layer's attention has computed for the tokens of one row."""
        projections: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
            name: (output, partial(self._heads, in_heads, row))
            for name, (output, in_heads) in attention.projections.items()
        }
        lse = None if attention.lse is None else self.row(attention.lse, row, 2).contiguous()
        return LayerAttention(projections, lse)

    def _heads(self, in_heads: Callable[[Tensor], Tensor], row: int, output: Tensor) -> Tensor:
        return self.row(in_heads(output), row, 2)

    def token_map(self, maps: Sequence[Tensor], tokens: int) -> Tensor:
        """The maps [1, length] of all rows as one, i32 [B, tokens], -1 for the padding."""
        padded = pad_sequence([row[0] for row in maps], batch_first=True, padding_value=-1)
        whole = padded.new_full((padded.shape[0], tokens), -1)
        if self.positions is None:
            whole[:, : padded.shape[1]] = padded
            return whole
        return whole.scatter(1, self.positions[:, : padded.shape[1]], padded)
