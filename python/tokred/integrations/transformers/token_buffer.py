"""Tokens of a cache in memory with room for more, so that appending one copies no other."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# A cache without a capacity grows by an eighth: a token is copied eight times on the way, which is
# nothing beside the steps of attention that read it.
_GROWTH = 8
_MIN_GROWTH = 16  # tokens
_LARGE_BYTES = 16 << 20  # from which on outputs of the ops ask for huge pages
_MADV_HUGEPAGE = 14


@dataclass(eq=False)
class TokenBuffer:
    """The first `length` tokens of memory [B, H, room, ...].

    Buffers are not changed but replaced. Only room that holds no tokens is written, so that a call
    which fails leaves the tokens it began with.
    """

    memory: Tensor
    length: int

    @classmethod
    def like(cls, x: Tensor, room: int = 0) -> TokenBuffer:
        """An empty buffer for tokens like those of x [B, H, L, ...]."""
        return cls(_memory(x, [x.shape[0], x.shape[1], room, *x.shape[3:]]), 0)

    @classmethod
    def of(cls, tokens: Tensor) -> TokenBuffer:
        """The tokens [B, H, L, ...], in their own memory, without room for more."""
        return cls(tokens, tokens.shape[2])

    @cached_property
    def tokens(self) -> Tensor:
        """[B, H, length, ...], a view."""
        x, length = self.memory, self.length
        return x if length == x.shape[2] else x.narrow(2, 0, length)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, length, D], if tokens have channels."""
        batch, heads, _, dim = self.memory.shape
        return batch, heads, self.length, dim

    def parts(self) -> list[Tensor]:
        """The tensors [B, H, length, ...] that it is made of."""
        return [self.tokens]

    def with_parts(self, tokens: Tensor) -> TokenBuffer:
        """A buffer of the same kind with these in the place of its parts; no room for more."""
        return TokenBuffer.of(tokens)

    def map(self, function: Callable[[TokenBuffer], TokenBuffer]) -> TokenBuffer:
        """The function applied to every buffer that it is made of."""
        return function(self)

    def can_hold(self, x: Tensor) -> bool:
        """Whether tokens of the dtype of x can be written into it."""
        return x.dtype == self.memory.dtype

    def stored_as(self, x: Tensor) -> list[Tensor]:
        """The tokens x [B, H, L, D] as they are written into each of parts()."""
        return [x]

    @property
    def room(self) -> int:
        """Tokens that there is memory for."""
        return self.memory.shape[2]

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens, without the room."""
        return self.tokens.numel() * self.memory.element_size()

    @property
    def is_locked(self) -> bool:
        """Whether it was made in inference mode, which this is not: then it cannot be written."""
        return self.memory.is_inference() and not torch.is_inference_mode_enabled()

    def with_room(self, room: int) -> TokenBuffer:
        """The same tokens with room for so many."""
        x = self.memory
        memory = _memory(x, [*x.shape[:2], room, *x.shape[3:]])
        memory.narrow(2, 0, self.length).copy_(self.tokens)
        return TokenBuffer(memory, self.length)

    def appended(self, x: Tensor, capacity: int | None = None) -> TokenBuffer:
        """A buffer with tokens x [B, H, L, ...] at the end, in the wider dtype, as torch.cat does.

        capacity: the room to grow to where there is not enough; None: by an eighth.
        """
        buffer, length = self, self.length + x.shape[2]
        if x.dtype != self.memory.dtype:
            dtype = torch.promote_types(x.dtype, self.memory.dtype)
            if dtype != self.memory.dtype:
                buffer = replace(self, memory=self.memory.to(dtype))
        if length > buffer.room or buffer.is_locked:
            buffer = buffer.with_room(grown(length) if capacity is None else capacity)
        buffer.memory.narrow(2, self.length, x.shape[2]).copy_(x)
        return TokenBuffer(buffer.memory, length)

    def cropped(self, length: int) -> TokenBuffer:
        """The first tokens; the memory stays."""
        return TokenBuffer(self.memory, length)

    def rows(self, numbers: Tensor) -> TokenBuffer:
        """These rows of the batch, int [B'], with the same room; memory of its own."""
        x = self.memory
        memory = _memory(x, [numbers.shape[0], *x.shape[1:]])
        torch.index_select(self.tokens, 0, numbers, out=memory.narrow(2, 0, self.length))
        return TokenBuffer(memory, self.length)

    def to(self, device: torch.device | str) -> TokenBuffer:
        """The same on a device."""
        return replace(self, memory=self.memory.to(device, non_blocking=True))


def grown(length: int) -> int:
    """Room that is made where it has become too small for so many tokens."""
    return length + max(length // _GROWTH, _MIN_GROWTH)


def _memory(x: Tensor, shape: list[int]) -> Tensor:
    """Fresh memory for tokens like x, to be written in inference mode and out of it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _memory(x, shape)
    memory = torch.empty(shape, dtype=x.dtype, device=x.device)
    if not torch.compiler.is_compiling() and memory.nbytes >= _LARGE_BYTES:
        _advise_huge_pages(memory)
    return memory


def _advise_huge_pages(memory: Tensor) -> None:
    """Advice only: where the system has no huge pages, nothing changes but the speed."""
    if memory.device.type != "cpu" or sys.platform != "linux":
        return
    page = 2 << 20
    begin = -(-memory.data_ptr() // page) * page
    end = (memory.data_ptr() + memory.nbytes) // page * page
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), _MADV_HUGEPAGE)
