"""The keys and values of a layer that a method has left in it, in full precision or packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import tokred
from tokred.ops.kv_pack import PackFormat
from tokred.patching import Eviction, EvictionCall

from .packed_buffer import PackedBuffer
from .token_buffer import TokenBuffer


@dataclass(eq=False, slots=True)
class Kept:
    """The M keys and values that a layer stores. Methods return another Kept, which may use the
    memory of this one.

    keys: [B, Hkv, M, D]. values: [B, Hkv, M, Dv]; both packed or neither.
    position: i32 [B, Hkv, M], places in the sequence, -1 for none; None while all tokens are there.
    bias: f32 [B, Hkv, M], see EvictionCall; None for 0. start: i32 [B], see EvictionCall.
    state: see Eviction.
    free: int32 [B, Hkv, 1], the slot of a key that was evicted, where the state is 0; the next
        token is written into it, so that no key moves. None where all M are there.
    """

    keys: TokenBuffer | PackedBuffer
    values: TokenBuffer | PackedBuffer
    position: TokenBuffer | None = None
    bias: TokenBuffer | None = None
    start: Tensor | None = None
    state: dict[str, TokenBuffer] = field(default_factory=dict)
    free: Tensor | None = None

    def map(self, function: Callable[[TokenBuffer], TokenBuffer]) -> Kept:
        """The function applied to every buffer."""
        position, bias = (
            None if each is None else function(each) for each in (self.position, self.bias)
        )
        state = {name: function(each) for name, each in self.state.items()}
        keys, values = self.keys.map(function), self.values.map(function)
        return Kept(keys, values, position, bias, self.start, state, self.free)

    def tensors(self) -> list[Tensor]:
        """All memory in use, room for more tokens included."""
        found = [x for x in (self.start, self.free, self.mean) if x is not None]

        def noted(buffer: TokenBuffer) -> TokenBuffer:
            found.append(buffer.memory)
            return buffer

        self.map(noted)
        return found

    @property
    def mean(self) -> Tensor | None:
        """[B, Hkv, 1, D], subtracted from keys before they were packed; or None."""
        return self.keys.mean if isinstance(self.keys, PackedBuffer) else None

    def rows(self, numbers: Tensor) -> Kept:
        """The rows of the batch with these numbers, int [B']."""
        kept = self.map(lambda buffer: buffer.rows(numbers))
        kept.start, kept.free = (None if x is None else x[numbers] for x in (self.start, self.free))
        if isinstance(kept.keys, PackedBuffer) and kept.keys.mean is not None:
            kept.keys = replace(kept.keys, mean=kept.keys.mean[numbers])
        return kept

    def to(self, device: torch.device | str) -> Kept:
        """The same on a device."""
        kept = self.without_free_slot().map(lambda buffer: buffer.to(device))
        if kept.start is not None:
            kept.start = kept.start.to(device)
        if isinstance(kept.keys, PackedBuffer) and kept.keys.mean is not None:
            kept.keys = replace(kept.keys, mean=kept.keys.mean.to(device))
        return kept

    def packed(self, key: PackFormat, value: PackFormat, center: bool) -> Kept:
        """The same with packed keys and values; itself if they are packed already."""
        if isinstance(self.keys, PackedBuffer) or isinstance(self.values, PackedBuffer):
            return self
        kept = self.without_free_slot()
        keys = PackedBuffer.of(kept.keys.tokens, key, center)
        return replace(kept, keys=keys, values=PackedBuffer.of(kept.values.tokens, value))

    def with_in_free_slot(self, keys: Tensor, values: Tensor, place: int) -> Kept | None:
        """Writes a token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], into the free slot; None
        where there is none, or where it cannot hold tokens of this dtype."""
        slot = self.free
        if slot is None or keys.shape[2] != 1 or self.position is None:
            return None
        if not self.keys.can_hold(keys) or not self.values.can_hold(values) or self._is_locked():
            return None
        old = zip(self.keys.parts(), self.keys.stored_as(keys),
                  self.values.parts(), self.values.stored_as(values), strict=True)  # fmt: skip
        for part in old:  # of packed tokens the codes, and then the params
            tokred.replace_token(slot, *part, self.position.tokens, place)
        if self.bias is not None:
            self.bias.memory.scatter_(2, slot, 0.0)
        return Kept(self.keys, self.values, self.position, self.bias, self.start, self.state)

    def _is_locked(self) -> bool:
        """Whether a buffer was made in inference mode, which this is not."""
        if torch.is_inference_mode_enabled():
            return False
        small = [each for each in (self.position, self.bias) if each is not None]
        return any(x.is_locked for x in (self.keys, self.values, *small, *self.state.values()))

    def without_free_slot(self) -> Kept:
        """The same keys without a free slot: the last key moves into it."""
        slot = self.free
        if slot is None:
            return self
        return replace(self.map(lambda buffer: moved_last(buffer, slot)), free=None)

    def shown(self, buffer: TokenBuffer | PackedBuffer | None) -> Tensor | None:
        """The tokens of one of its buffers, without the free slot; a copy where there is one."""
        if buffer is None or self.free is None:
            return None if buffer is None else buffer.tokens
        return moved_last(TokenBuffer.of(buffer.tokens.clone()), self.free).tokens

    def appended(self, keys: Tensor, values: Tensor, length: int) -> Kept:
        """The kept keys and new tokens, which follow `length` tokens of the sequence."""
        batch, heads, count = keys.shape[:3]
        position, bias = self.position, self.bias
        if position is not None:
            new = torch.arange(length, length + count, dtype=torch.int32, device=keys.device)
            position = position.appended(new.view(1, 1, count))
        zeros = None
        if bias is not None or self.state:
            zeros = torch.zeros(batch, heads, count, device=keys.device)
        if bias is not None:
            bias = bias.appended(zeros)
        state = {name: each.appended(zeros) for name, each in self.state.items()}
        return Kept(
            self.keys.appended(keys), self.values.appended(values), position, bias, self.start,
            state,
        )  # fmt: skip

    def hidden(self, visible: Tensor, slot: Tensor | None) -> Kept:
        """Hides new keys, those in slot or else the last ones, where visible, bool [B | 1, L], is
        False."""
        batch, heads, stored, _ = self.keys.shape
        count, device = visible.shape[1], visible.device
        bias = self.bias
        if bias is None:
            bias = TokenBuffer(torch.zeros(batch, heads, stored, device=device), stored)
        new = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
        if slot is None:
            bias.memory.narrow(2, stored - count, count).copy_(new[:, None])
        else:
            bias.memory.scatter_(2, slot, new[:, None].expand(batch, heads, 1))
        return replace(self, bias=bias)

    def after(self, eviction: Eviction, call: EvictionCall) -> Kept:
        """The keys that stay after an eviction, the method's answer to the call."""
        # Of its own memory, as new tokens are written into it.
        state = {name: TokenBuffer.of(x.contiguous()) for name, x in eviction.state.items()}
        kept = Kept(self.keys, self.values, self.position, self.bias, self.start, state)
        if eviction.slots is None and eviction.dropped is None:
            return kept
        position, bias = call.position.contiguous(), call.bias
        if eviction.dropped is not None:
            if kept.position is None:
                own = None if bias is None else TokenBuffer.of(bias.contiguous())
                kept = replace(kept, position=TokenBuffer.of(position), bias=own)
            kept.free = eviction.dropped
            if not eviction.cleared:
                for each in state.values():
                    each.memory.scatter_(2, kept.free, 0.0)
            return kept
        slots = eviction.slots
        tensors = {f"keys {i}": x for i, x in enumerate(self.keys.parts())}
        tensors |= {f"values {i}": x for i, x in enumerate(self.values.parts())}
        tensors["position"] = position
        tensors |= {name: each.tokens.contiguous() for name, each in kept.state.items()}
        if bias is not None:
            tensors["bias"] = bias.contiguous()
        rows = tokred.gather_tokens([*tensors.values()], slots, [2] * len(tensors))
        found = dict(zip(tensors, rows, strict=True))
        if eviction.padded:
            nothing = slots < 0
            found["position"].masked_fill_(nothing, -1)
            bias = found.get("bias", torch.zeros(slots.shape, device=slots.device))
            found["bias"] = bias.masked_fill(nothing, -torch.inf)
        count = len(self.keys.parts())
        buffers = {name: TokenBuffer.of(x) for name, x in found.items()}
        keys = self.keys.with_parts(*rows[:count])
        values = self.values.with_parts(*rows[count : 2 * count])
        state = {name: buffers[name] for name in kept.state}
        return Kept(keys, values, buffers["position"], buffers.get("bias"), self.start, state)


def moved_last(buffer: TokenBuffer, slot: Tensor) -> TokenBuffer:
    """Without the tokens in slot, int32 [B, H, 1]: the last token of each head moves into it."""
    buffer = buffer.with_room(buffer.room) if buffer.is_locked else buffer
    x, last = buffer.memory, buffer.length - 1
    index = slot if x.dim() == 3 else slot[..., None].expand(-1, -1, -1, x.shape[3])
    x.scatter_(2, index, x.narrow(2, last, 1).clone())
    return buffer.cropped(last)


def check_like(name: str, x: Tensor, held: TokenBuffer | PackedBuffer) -> None:
    """Checks that tokens [B, Hkv, L, D] have the batch, heads and channels of those in the cache.

    Raises:
        ValueError: they have not.
    """
    batch, heads, _, dim = held.shape
    if x.shape[:2] != (batch, heads) or x.shape[3] != dim:
        raise ValueError(
            f"the cache holds {name} [B, Hkv, L, D] = {[batch, heads, x.shape[2], dim]}, got "
            f"{[*x.shape]}: reset() it before other tokens"
        )
