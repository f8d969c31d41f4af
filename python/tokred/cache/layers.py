"""One layer of a packed cache: appending, growing, rolling back and reordering its tokens."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tokred._library import refuse_grad
from tokred.integrations.transformers.packed_states import PackedStates
from tokred.ops.kv_pack import PackedKV

from .base import CacheBytes
from .contents import FLOATS, Contents
from .rollback import ROLLBACK, Checkpoint
from .storage import CacheOptions, Layout

# A cache without a capacity grows by a sixteenth: so little room is not used, and a token is copied
# sixteen times on the way, which is nothing beside the steps of attention that read it.
_GROWTH = 16
_MIN_GROWTH = 16  # tokens


class PackedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, packed; its update returns PackedStates in place of both.

    A call that raises leaves the layer as it was.

    Args:
        options: how they are packed.
        capacity: tokens to make room for at once, which then are all there is room for; grows with
            the tokens where None.
    """

    is_sliding = False
    is_croppable = True
    restores_itself = True
    rank = 0  # channels of a row that are its latent, where rows are latents

    def __init__(self, options: CacheOptions, capacity: int | None = None) -> None:
        super().__init__()
        self.options = options
        self.capacity = capacity
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Drops everything; the next tokens may have another batch size, dtype or device."""
        self._hold(None, 0, ())

    def _hold(
        self, contents: Contents | None, length: int, history: tuple[Checkpoint, ...]
    ) -> None:
        self.contents, self.length, self.history = contents, length, history
        self.is_initialized = contents is not None

    @property
    def packing(self) -> CacheOptions:
        """The options, under the name that methods which evict look for."""
        return self.options

    @property
    def layout(self) -> Layout | None:
        """How the tokens are packed; None before the first ones."""
        return None if self.contents is None else self.contents.layout

    @property
    def packed(self) -> tuple[PackedKV, PackedKV] | None:
        """Keys and values, with room for more than the tokens there are."""
        return None if self.contents is None else self.contents.packed

    @property
    def windows(self) -> dict[str, Tensor]:
        """The last tokens in full precision, of "key" and "value"; empty without a window."""
        return {} if self.contents is None else self.contents.windows

    @property
    def key_mean(self) -> Tensor | None:
        """[B, Hkv, 1, D], what is missing of every key in `packed` and `windows`, or None."""
        return None if self.contents is None else self.contents.key_mean

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the tokens in full precision."""
        return None if self.contents is None else self.contents.dtype

    @property
    def device(self) -> torch.device | None:
        """The device of the tokens, also while they are offloaded."""
        return None if self.contents is None else self.contents.device

    def restore(self, contents: Contents, length: int) -> None:
        """Replaces what the layer holds by these tokens."""
        self._hold(contents, length, ())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Raises:
            ValueError: a head dimension, or a dtype, that cannot be packed.
        """
        self._hold(self._fresh(key_states, value_states), 0, ())

    def _fresh(self, keys: Tensor, values: Tensor) -> Contents:
        _check_tokens(keys, values)
        layout = self.options.layout(keys.shape[3], values.shape[3])
        dtype = torch.promote_types(keys.dtype, values.dtype)
        room = layout.packed_tokens(self.capacity or 0)
        return Contents.empty(layout, keys.shape[0], keys.shape[1], room, dtype, keys.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedStates, PackedStates]:
        """Appends keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Their dtypes are float32, float16 or bfloat16 and may differ from each other and from
        earlier ones, as under autocast; as in a DynamicCache, what is held in full precision takes
        the widest of them.

        Raises:
            ValueError: tokens unlike those in the cache, or more than its capacity.
        """
        contents = self.contents
        if contents is None:
            contents = self._fresh(key_states, value_states)
        else:
            self._check(contents, key_states, value_states)
        count = key_states.shape[2]
        contents = self._with_room(contents, self.length + count)
        keys, values, history = key_states, value_states, self.history
        if not keys.dtype == values.dtype == contents.dtype:
            dtype = torch.promote_types(contents.dtype, keys.dtype)
            dtype = torch.promote_types(dtype, values.dtype)
            if dtype != contents.dtype:
                contents, history = contents.widened(dtype), ()
            keys, values = keys.to(dtype), values.to(dtype)
        if count == 1 and not self.record_past:
            contents = contents.appended(self.length, keys, values)
            history = ()
        else:
            contents, history = self._recorded(contents, keys, values, history)
        self._hold(contents, self.length + count, history)
        windows = contents.windows.get("key"), contents.windows.get("value")
        states = PackedStates(
            *contents.packed, *windows, self.length, key_states, value_states, contents.key_mean
        )
        return states, states

    def _recorded(
        self, contents: Contents, keys: Tensor, values: Tensor, history: tuple[Checkpoint, ...]
    ) -> tuple[Contents, tuple[Checkpoint, ...]]:
        """The contents with the tokens, and what can take the last ROLLBACK of them back."""
        length, count = self.length, keys.shape[2]
        if count == 0:
            return contents, history
        if contents.layout.window == 0 or (count > ROLLBACK and not self.record_past):
            return contents.appended(length, keys, values), ()
        if count > ROLLBACK:
            early = count - ROLLBACK
            contents = contents.appended(length, keys[:, :, :early], values[:, :, :early])
            keys, values, history = keys[:, :, early:], values[:, :, early:], ()
            length, count = length + early, ROLLBACK
        last = history[-1] if history and self.record_past else None
        if last is None or last.settled or last.tokens + count > ROLLBACK:
            kept: tuple[Checkpoint, ...] = () if last is None else (last,)
            last = Checkpoint.of(contents, length)
        else:
            kept = history[:-1]
        history = (*kept, last.extended(keys, values))
        return contents.appended(length, keys, values), history

    def _check(self, contents: Contents, keys: Tensor, values: Tensor) -> None:
        """Whether these tokens fit those in the cache."""
        _check_tokens(keys, values)
        layout, device = contents.layout, contents.packed[0].codes.device
        sides = (("keys", keys, layout.head_dim), ("values", values, layout.value_dim))
        for name, states, dim in sides:
            expected = (contents.batch, contents.heads, keys.shape[2], dim)
            if states.shape != expected:
                raise ValueError(
                    f"the cache holds {name} [B, Hkv, L, D] = {list(expected)}, got "
                    f"{list(states.shape)}: reset() it before other tokens"
                )
            if states.device != device:
                raise ValueError(
                    f"the cache holds {name} on {device}, got {states.device}: reset() it before "
                    "tokens on another device"
                )
        if not torch.compiler.is_compiling():
            _check_overlap(contents, keys, values)

    def _with_room(self, contents: Contents, tokens: int) -> Contents:
        """The contents with room for so many tokens in all."""
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(
                f"the cache has a capacity of {self.capacity} tokens and holds {self.length}: "
                f"there is no room for {tokens - self.length} more; nothing was appended"
            )
        needed = contents.layout.packed_tokens(tokens)
        if needed <= contents.room:
            return contents
        room = needed + max(needed // _GROWTH, _MIN_GROWTH)
        if self.capacity is not None:
            room = min(room, contents.layout.packed_tokens(self.capacity))
        return contents.with_room(self.length, room)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for the next query_length tokens covers, and its offset."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """The capacity, or -1 where there is none."""
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:
        """The name of get_max_length in older releases of transformers."""
        return self.get_max_length()

    def activate_past_recording(self) -> None:
        """From now on every update keeps what `crop` needs to be exact.

        transformers calls it for assisted generation. Without it only the tokens of the last update
        are kept, if they are 2 to 64.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens.

        Up to 64 tokens are removed exactly, as if they had never been appended: those of the last
        update, if it brought more than one, and of more updates after activate_past_recording().
        The cost is to pack again what remains of these updates. Beyond that, tokens that belong
        into the window are unpacked from their codes, with the error of packing.

        Raises:
            ValueError: a positive number, or more tokens than there are.
        """
        tokens_to_remove = operator.index(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative one, got "
                f"{tokens_to_remove}"
            )
        if -tokens_to_remove > self.length:
            raise ValueError(f"the cache holds {self.length} tokens, {-tokens_to_remove} cannot go")
        if self.contents is None:
            return
        length = self.length + tokens_to_remove
        if tokens_to_remove == 0:
            history = tuple(each.settle() for each in self.history)
            self._hold(self.contents, length, history)
            return
        for number in reversed(range(len(self.history))):
            checkpoint = self.history[number]
            if checkpoint.length <= length:
                contents, checkpoint = checkpoint.rolled_back(self.contents, length)
                self._hold(contents, length, (*self.history[:number], checkpoint.settle()))
                return
        self._hold(self.contents.cropped(self.length, length), length, ())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows of the batch, given by number or by a bool mask."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows of the batch in this order, as beam search chooses them."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def offload(self) -> None:
        """Moves everything to the CPU until prefetch."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Moves everything back to the device of the tokens."""
        device = self.device
        self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.contents is not None:
            contents = self.contents.map(function)
            history = tuple(each.map(function) for each in self.history)
            self._hold(contents, self.length, history)

    def __copy__(self) -> PackedCacheLayer:
        """A copy with tensors of its own, as appending a token writes in place."""
        return copy.deepcopy(self)

    def nbytes(self) -> CacheBytes:
        """The memory of the layer, in bytes."""
        contents = self.contents
        if contents is None:
            return CacheBytes()
        heads = contents.batch * contents.heads
        codes, params = (heads * n for n in contents.layout.split_bytes(self.length))
        tensors = contents.tensors()
        window = sum(tensors[name].nbytes for name in ("key_window", "value_window", "key_mean")
                     if name in tensors)  # fmt: skip
        packed = sum(side.nbytes for side in contents.packed)
        window += sum(each.nbytes for each in self.history)
        return CacheBytes(codes, params, window, 0, packed - codes - params)


def _check_tokens(keys: Tensor, values: Tensor) -> None:
    """Whether keys and values are of tokens that a cache can hold."""
    for name, states in (("keys", keys), ("values", values)):
        if not isinstance(states, Tensor) or states.dim() != 4:
            shape = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"PackedCache packs {name} [B, Hkv, L, D], got {shape}")
        if states.dtype not in FLOATS:
            raise ValueError(
                f"PackedCache packs {name} in float32, float16 and bfloat16, got {states.dtype}"
            )
        if states.stride(3) != 1 and states.shape[3] > 1:
            raise ValueError(
                f"PackedCache packs {name} whose last dimension is contiguous, got strides "
                f"{states.stride()}: call .contiguous()"
            )
    refuse_grad("PackedCache.update", key_states=keys, value_states=values)
    if keys.shape[:3] != values.shape[:3] or keys.device != values.device:
        raise ValueError(
            f"keys and values [B, Hkv, L, D | Dv] must be of the same tokens on one device, got "
            f"{list(keys.shape)} on {keys.device} and {list(values.shape)} on {values.device}"
        )


def _check_overlap(contents: Contents, keys: Tensor, values: Tensor) -> None:
    """Refuses tokens that are read from where they are written."""
    # Codes are bytes, and params are not handed out: windows alone look like tokens.
    windows = contents.windows.values()
    places = {tensor.untyped_storage().data_ptr() for tensor in windows} - {0}
    for name, states in (("keys", keys), ("values", values)):
        if states.untyped_storage().data_ptr() in places:
            raise ValueError(f"the {name} lie in the memory of the cache itself: clone() them")
