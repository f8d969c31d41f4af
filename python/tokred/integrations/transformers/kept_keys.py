"""The cache of a layer that keeps fewer keys than it has seen tokens.

What is stored are the keys that a method (a KeyEvictor) has let stay, in any order, each with the
place where it stood. Lengths, positions and masks go on counting all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

import tokred
from tokred._library import refuse_grad
from tokred.patching import Eviction, EvictionCall, KeyEvictor, Replacement

from .token_buffer import TokenBuffer

ADVICE = (
    "keys were evicted from this cache inside tokred.patch(...), and only tokred's attention reads "
    "what is left: go on inside the patch, or begin with a new cache"
)


@dataclass(eq=False, slots=True)
class Kept:
    """What a layer holds; replaced, not changed, but for one row of each head (`free`).

    keys [B, Hkv, M, D], values [B, Hkv, M, Dv].
    position: i32 [B, Hkv, M], places in the sequence, -1 for none; None while all tokens are there.
    bias: f32 [B, Hkv, M], see EvictionCall; None for 0. start: i32 [B], see EvictionCall.
    state: see Eviction.
    free: int64 [B, Hkv, 1], the slot of a key that has gone, which the next token takes; None where
        all M are there. So a token that drops another moves nothing.
    """

    keys: TokenBuffer
    values: TokenBuffer
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
        keys, values = function(self.keys), function(self.values)
        return Kept(keys, values, position, bias, self.start, state, self.free)

    def taken(self, keys: Tensor, values: Tensor, place: int) -> Kept | None:
        """With a token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], in the free slot; None
        where there is no such slot, or none for tokens of this dtype."""
        slot = self.free
        if slot is None or keys.shape[2] != 1 or self.position is None:
            return None
        held = self.keys.memory, self.values.memory
        if keys.dtype != held[0].dtype or values.dtype != held[1].dtype or self._is_locked():
            return None
        row = slot.unsqueeze(3)
        index = row.expand_as(keys)
        held[0].scatter_(2, index, keys)
        held[1].scatter_(2, index if values.shape == keys.shape else row.expand_as(values), values)
        self.position.memory.scatter_(2, slot, place)
        if self.bias is not None:
            self.bias.memory.scatter_(2, slot, 0.0)
        for each in self.state.values():
            each.memory.scatter_(2, slot, 0.0)
        return Kept(self.keys, self.values, self.position, self.bias, self.start, self.state)

    def _is_locked(self) -> bool:
        """Whether one of the buffers cannot be written here."""
        if torch.is_inference_mode_enabled():
            return False
        small = [each for each in (self.position, self.bias) if each is not None]
        return any(x.is_locked for x in (self.keys, self.values, *small, *self.state.values()))

    def settled(self) -> Kept:
        """The same without a free slot: the last key takes it."""
        slot = self.free
        if slot is None:
            return self
        return replace(self.map(lambda buffer: _moved(buffer, slot)), free=None)

    def shown(self, buffer: TokenBuffer | None) -> Tensor | None:
        """The tokens of one of its buffers, what is free left out."""
        if buffer is None or self.free is None:
            return None if buffer is None else buffer.tokens
        return _moved(_full(buffer.tokens.clone()), self.free).tokens

    def appended(self, keys: Tensor, values: Tensor, length: int) -> Kept:
        """With new tokens behind; `length` were seen before them."""
        batch, heads, count = keys.shape[:3]
        position, bias = self.position, self.bias
        if position is not None:
            new = torch.arange(length, length + count, dtype=torch.int32, device=keys.device)
            position = position.appended(new[None, None])
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
        """With the new keys, in slot or else the last ones, hidden where visible, bool
        [B | 1, L], is not."""
        batch, heads, stored = self.keys.tokens.shape[:3]
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

    def of(self, eviction: Eviction, call: EvictionCall) -> Kept:
        """What stays of the keys, which the call describes."""
        state = {name: _full(x) for name, x in eviction.state.items()}
        kept = Kept(self.keys, self.values, self.position, self.bias, self.start, state)
        if eviction.slots is None and eviction.dropped is None:
            return kept
        position, bias = call.position.contiguous(), call.bias
        if eviction.dropped is not None:
            if kept.position is None:
                own = None if bias is None else _full(bias.contiguous())
                kept = replace(kept, position=_full(position), bias=own)
            kept.free = eviction.dropped
            return kept
        slots = eviction.slots
        tensors = {"keys": self.keys.tokens, "values": self.values.tokens, "position": position}
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
        buffers = {name: _full(x) for name, x in found.items()}
        state = {name: buffers[name] for name in kept.state}
        return Kept(
            buffers["keys"], buffers["values"], buffers["position"], buffers.get("bias"),
            self.start, state,
        )  # fmt: skip


def _moved(buffer: TokenBuffer, slot: Tensor) -> TokenBuffer:
    """Without the tokens in slot, int64 [B, H, 1]: the last ones take their places in memory."""
    buffer = buffer.with_room(buffer.room) if buffer.is_locked else buffer
    x, last = buffer.memory, buffer.length - 1
    index = slot if x.dim() == 3 else slot[..., None].expand(-1, -1, -1, x.shape[3])
    x.scatter_(2, index, x.narrow(2, last, 1).clone())
    return buffer.cropped(last)


def _check_like(name: str, x: Tensor, held: Tensor) -> None:
    """Whether these tokens go with those in the cache."""
    batch, heads, _, dim = held.shape
    if x.shape[:2] != (batch, heads) or x.shape[3] != dim:
        raise ValueError(
            f"the cache holds {name} [B, Hkv, L, D] = {[batch, heads, x.shape[2], dim]}, got "
            f"{[*x.shape]}: reset() it before other tokens"
        )


def _full(x: Tensor) -> TokenBuffer:
    """A buffer of these tokens without room for more."""
    return TokenBuffer(x, x.shape[2])


class KeptKeysLayer(CacheLayerMixin):
    """The cache of one layer, of which a method lets some keys stay after every forward pass.

    Args:
        evictor: the method. number, num_layers: of this layer among those of full attention.
        rotary: the model's rotary embedding, where the method reads it.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, evictor: KeyEvictor, number: int, num_layers: int, rotary: Any = None
    ) -> None:
        self.evictor, self.number, self.num_layers = evictor, number, num_layers
        self.rotary = rotary
        self.length = 0
        self.kept: Kept | None = None
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, M, D], those that are left."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.keys)

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, M, Dv], those that are left."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.values)

    @property
    def position(self) -> Tensor | None:
        """i32 [B, Hkv, M], where they stand in the sequence, -1 for an empty place; None: all are
        there."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.position)

    @property
    def bias(self) -> Tensor | None:
        """f32 [B, Hkv, M], what is added to their logits, -inf for an empty place; None: nothing,
        or nothing was evicted yet."""
        kept = self.kept
        return None if kept is None else kept.shown(kept.bias)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first tokens are kept as they come."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[KeptStates, None]:
        """Appends keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Raises:
            ValueError: tokens unlike those in the cache, or that require grad.
        """
        refuse_grad("a cache that keeps fewer keys", key_states=key_states,
                    value_states=value_states)  # fmt: skip
        slot = None
        if self.kept is None:
            kept = Kept(_full(key_states), _full(value_states))
        else:
            _check_like("keys", key_states, self.kept.keys.memory)
            _check_like("values", value_states, self.kept.values.memory)
            taken = self.kept.taken(key_states, value_states, self.length)
            if taken is None:
                kept = self.kept.settled().appended(key_states, value_states, self.length)
            else:
                kept, slot = taken, self.kept.free
        self.kept, self.length = kept, self.length + key_states.shape[2]
        self.is_initialized, self.device = True, key_states.device
        return KeptStates(self, kept, self.length, key_states, slot), None

    def shrink(self, kept: Kept, call: EvictionCall, whole: bool) -> None:
        """Asks the method what stays, after the queries of a pass have attended to all of `kept`.

        Raises:
            ValueError: something goes, and may not: `whole`.
        """
        result = self.evictor.evict(call)
        stays = result is None or (
            isinstance(result, Eviction) and result.slots is None and result.dropped is None
        )
        if whole and not stays:
            raise ValueError(
                "attention_mask hides other keys from one query than from another, and keys cannot "
                "be evicted under it: pass a mask of padding, [B, N], or a budget that the prompt "
                "does not exceed"
            )
        if isinstance(result, Replacement):
            new = (result.k, result.v, result.position.to(torch.int32), result.bias)
            kept = Kept(*(None if x is None else _full(x) for x in new), kept.start)
        elif result is not None:
            kept = kept.of(result, call)
        self.kept = kept

    def call(
        self, states: KeptStates, kept: Kept, q: Tensor, k: Tensor, v: Tensor, lse: Tensor,
        scale: float | None, bias: Tensor | None,
    ) -> EvictionCall:  # fmt: skip
        """What the method is given after a pass."""
        if kept.position is None:
            place = torch.arange(k.shape[2], dtype=torch.int32, device=q.device)
            position = place.expand(*k.shape[:2], -1)
        else:
            position = kept.position.tokens
        state = {name: each.tokens for name, each in kept.state.items()}
        return EvictionCall(
            q, k, v, lse, position, bias, self.length, kept.start, scale, self.number,
            self.num_layers, state, self.rotary, states.new, states.slot,
        )  # fmt: skip

    def get_seq_length(self) -> int:
        """All tokens so far, those that are gone included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask covers all tokens, those that are gone included; and its offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """There is none."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in older releases of transformers."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses to take tokens back.

        Raises:
            ValueError: a number other than 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                "tokens cannot be taken back from a cache that keeps fewer keys, as others have "
                "made room for them: use a method that chooses keys, such as token_select, for "
                "assisted generation"
            )

    def reset(self) -> None:
        """Drops everything."""
        self.kept, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the batch in this order, as beam search chooses them."""
        if self.kept is not None:
            rows = beam_idx.to(self.kept.keys.memory.device)
            kept = self.kept.map(lambda buffer: buffer.rows(rows))
            start, free = (None if x is None else x[rows] for x in (kept.start, kept.free))
            self.kept = replace(kept, start=start, free=free)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.kept is not None:
            self.reorder_cache(self._numbers().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps these rows of the batch, given by number or by a bool mask."""
        if self.kept is not None:
            self.reorder_cache(self._numbers()[indices])

    def _numbers(self) -> Tensor:
        assert self.kept is not None
        memory = self.kept.keys.memory
        return torch.arange(memory.shape[0], device=memory.device)

    def offload(self) -> None:
        """Moves everything to the CPU until prefetch."""
        self._to("cpu")

    def prefetch(self) -> None:
        """Moves everything back to the device of the tokens."""
        self._to(self.device)

    def _to(self, device: torch.device | str) -> None:
        if self.kept is not None:
            self.kept = self.kept.settled().map(lambda buffer: buffer.to(device))


@dataclass(eq=False)
class KeptStates:
    """A layer's stored keys after the tokens of a forward pass were appended.

    It is no tensor; using it as one raises an error that says what to do.

    kept: with the new tokens. length: all tokens so far. new: keys of this pass, [B, Hkv, L, D].
    slot: int64 [B, Hkv, 1], where a new token is stored; None for the last places.
    """

    layer: KeptKeysLayer
    kept: Kept
    length: int
    new: Tensor
    slot: Tensor | None

    def refuse(
        self, module: nn.Module, method: Any, s_aux: Any, indices: Any, softcap: float | None
    ) -> None:
        """Refuses what a layer adds to attention, and another method in the same layer.

        Raises:
            ValueError: saying what.
        """
        what = {"attention sinks (s_aux)": s_aux, "lists of keys": indices}
        what["soft-capped logits"] = softcap
        for name, each in what.items():
            if each is not None:
                raise ValueError(
                    f"{type(module).__name__} has {name}, with which keys cannot be evicted"
                )
        if method is not None:
            raise ValueError(
                f"{type(self.layer.evictor).__name__} evicts keys in a layer in which another "
                "patch chooses keys: leave one of the two"
            )

    def attend(self, q: Tensor, mask: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
        """Causal attention to what is stored, out [B, Hq, L, Dv] and lse f32 [B, Hq, L]; then keys
        are evicted.

        Args:
            mask: bool [B | 1, 1, 1, N] over all tokens, where padding is hidden; or a mask of every
                query, [B | 1, 1, L, N], as long as every key is there and stays.
        """
        kept, slot, queries = self.kept, self.slot, q.shape[2]
        own = mask is not None and mask.shape[2] > 1
        if mask is not None and (mask.dtype != torch.bool or mask.shape[3] != self.length):
            raise ValueError(
                f"attention_mask must be bool and cover all {self.length} tokens so far, those "
                f"that were evicted included, got {mask.dtype} {list(mask.shape)}"
            )
        if own and kept.position is not None:
            raise ValueError(
                "attention_mask has a row for every query, and some of its keys were evicted: pass "
                f"a mask of padding, [B, N], got {list(mask.shape)}"
            )
        keys, values = kept.keys.tokens.to(q.dtype), kept.values.tokens.to(q.dtype)
        if kept.position is None:
            out, lse = tokred.biased_attention(
                q, keys, values, causal=queries > 1 and not own, scale=scale, mask=mask
            )
            bias = None
            if mask is not None and not own:
                visible = mask[:, 0, 0].expand(q.shape[0], -1)
                if kept.start is None:
                    kept = replace(kept, start=visible.int().argmax(1).to(torch.int32))
                bias = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, -torch.inf)
                bias = bias[:, None].expand(-1, keys.shape[1], -1)
        else:
            if mask is not None:
                kept = kept.hidden(mask[:, 0, 0, self.length - self.new.shape[2] :], slot)
            bias = None if kept.bias is None else kept.bias.tokens
            out, lse = tokred.biased_attention(
                q, keys, values, bias, causal=queries > 1, scale=scale
            )
        call = self.layer.call(self, kept, q, keys, values, lse, scale, bias)
        self.layer.shrink(kept, call, own)
        return out, lse

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(f"no slices: {ADVICE}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r}: {ADVICE}")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{getattr(function, '__name__', function)}: {ADVICE}")
