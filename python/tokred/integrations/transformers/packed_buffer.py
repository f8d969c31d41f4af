"""Tokens of a cache as codes of a few bits, in memory with room for more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tokred
from tokred.ops.kv_pack import PackedKV, PackFormat

from .token_buffer import TokenBuffer

# The mean of fewer keys than this says little of the keys that follow.
_MIN_CENTERED = 16

# The attribute of a cache's keys under which it hands out codes of them, a PackedKV, for scoring.
SCORE_KEYS = "score_keys"


@dataclass(eq=False)
class PackedBuffer:
    """Keys or values [B, H, M, D], packed along channels.

    codes, params: see `kv_pack`, with the same M. dtype: of `tokens`.
    mean: [B, H, 1, D], subtracted from every token before it was packed; or None.
    """

    codes: TokenBuffer
    params: TokenBuffer
    format: PackFormat
    dtype: torch.dtype
    mean: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, form: PackFormat, center: bool = False) -> PackedBuffer:
        """The tokens x [B, H, M, D]; with center, their mean is subtracted if M is at least 16."""
        mean = None
        if center and x.shape[2] >= _MIN_CENTERED:
            mean = x.mean(2, keepdim=True, dtype=torch.float32)
            mean = torch.where(mean.isfinite(), mean, 0).to(x.dtype)
        empty = form.empty(x.shape[0], x.shape[1], 0, x.shape[3], x.device)
        codes, params = (TokenBuffer(each, 0) for each in (empty.codes, empty.params))
        return cls(codes, params, form, x.dtype, mean).appended(x)

    @property
    def packed(self) -> PackedKV:
        """Codes and params of all tokens, without the mean, as the ops read them."""
        return PackedKV(self.codes.tokens, self.params.tokens, self.format)

    @property
    def tokens(self) -> Tensor:
        """[B, H, M, D], unpacked into memory of its own."""
        tokens = tokred.kv_unpack(self.packed, self.dtype)
        return tokens if self.mean is None else tokens.add_(self.mean)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, M, D]."""
        batch, heads, length, size = self.codes.shape
        return batch, heads, length, size * 8 // self.format.bits

    @property
    def is_locked(self) -> bool:
        """See TokenBuffer."""
        return self.codes.is_locked or self.params.is_locked

    def parts(self) -> list[Tensor]:
        """See TokenBuffer."""
        return [self.codes.tokens, self.params.tokens]

    def with_parts(self, codes: Tensor, params: Tensor) -> PackedBuffer:
        """See TokenBuffer."""
        return replace(self, codes=TokenBuffer.of(codes), params=TokenBuffer.of(params))

    def map(self, function: Callable[[TokenBuffer], TokenBuffer]) -> PackedBuffer:
        """See TokenBuffer."""
        return replace(self, codes=function(self.codes), params=function(self.params))

    def can_hold(self, x: Tensor) -> bool:
        """True: tokens of any dtype can be packed."""
        return True

    def stored_as(self, x: Tensor) -> list[Tensor]:
        """See TokenBuffer."""
        new = self._pack(x)
        return [new.codes, new.params]

    def appended(self, x: Tensor) -> PackedBuffer:
        """The buffer with the tokens x [B, H, L, D] at the end."""
        new = self._pack(x)
        codes, params = self.codes.appended(new.codes), self.params.appended(new.params)
        return replace(self, codes=codes, params=params)

    def _pack(self, x: Tensor) -> PackedKV:
        form = self.format
        x = x if self.mean is None else x - self.mean
        return tokred.kv_pack(x, form.bits, form.group_size, "channel", form.scheme, form.rotated)
