"""A layer of a packed cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

import tokred
from tokred.models.packed import PackedStates
from tokred.ops.kv_pack import PackedKV, packed_tokens

from .storage import CacheOptions, Layout

# A cache without a capacity grows by a sixteenth: so little room is not used, and a token is copied
# sixteen times on the way, which is nothing beside the steps of attention that read it.
_GROWTH = 16
_LEAST_GROWTH = 16  # tokens


@dataclass(frozen=True)
class CacheBytes:
    """What a cache takes, in bytes.

    codes, params: of the packed tokens. window: the rows in full precision, used or not.
    full_precision: layers that are not packed. slack: room for more tokens, and padding.
    """

    codes: int = 0
    params: int = 0
    window: int = 0
    full_precision: int = 0
    slack: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __add__(self, other: CacheBytes) -> CacheBytes:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return CacheBytes(*(a + b for a, b in pairs))


class PackedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, packed; its update returns PackedStates in place of tensors.

    Args:
        options: how they are packed.
        capacity: tokens to make room for at once, which then are all there is room for; grows with
            the tokens where None.
    """

    is_sliding = False

    def __init__(self, options: CacheOptions, capacity: int | None = None) -> None:
        super().__init__()
        self.options = options
        self.capacity = capacity
        # What crop takes back out of packed tokens has lost what packing loses.
        self.is_croppable = options.window == 0
        self.reset()

    def reset(self) -> None:
        """Drops everything; the next tokens may have another batch size, dtype or device."""
        self.length = 0
        self.layout: Layout | None = None
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.buffers: dict[str, Tensor] = {}
        self.windows: dict[str, Tensor] = {}
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers for keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Raises:
            ValueError: a head dimension, or a dtype, that cannot be packed.
        """
        layout = self.options.layout(key_states.shape[3], value_states.shape[3])
        if key_states.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"PackedCache packs float32, float16 and bfloat16, got {key_states.dtype}"
            )
        self.allocate(layout, *key_states.shape[:2], key_states.dtype, key_states.device)

    def allocate(
        self, layout: Layout, batch: int, heads: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes the buffers of an empty cache."""
        self.layout, self.dtype, self.device = layout, dtype, device
        self.windows = {
            name: torch.zeros(batch, heads, layout.window, dim, dtype=dtype, device=device)
            for name, dim in (("key", layout.head_dim), ("value", layout.value_dim))
            if layout.window > 0
        }
        rows = layout.packed_tokens(self.capacity or 0)
        self._hold(self._empty_buffers(batch, heads, rows))
        self.is_initialized = True

    def _empty_buffers(self, batch: int, heads: int, tokens: int) -> dict[str, Tensor]:
        unit = self.layout.unit
        tokens = -(-tokens // unit) * unit
        return {
            name: torch.zeros(
                batch, heads, tokens // rows.tokens, rows.columns,
                dtype=rows.dtype, device=self.device,
            )
            for name, rows in self.layout.buffers().items()
        }  # fmt: skip

    def _hold(self, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        self.packed = self.layout.views(buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedStates, None]:
        """Appends keys [B, Hkv, L, D] and values [B, Hkv, L, Dv].

        Raises:
            ValueError: tokens unlike those in the cache, or more than its capacity; it is
                unchanged then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        tokens = self.length + key_states.shape[2]
        self.make_room(tokens)
        key, value = self.packed
        windows = self.windows.get("key"), self.windows.get("value")
        tokred.kv_append(key_states, key, self.length, windows[0])
        tokred.kv_append(value_states, value, self.length, windows[1])
        self.length = tokens
        return PackedStates(key, value, *windows, tokens, key_states, value_states), None

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        sides = (("keys", key_states, self.layout.head_dim),
                 ("values", value_states, self.layout.value_dim))  # fmt: skip
        batch, heads = self.packed[0].codes.shape[:2]
        for name, states, dim in sides:
            expected = [batch, heads, key_states.shape[2], dim]
            if list(states.shape) != expected:
                raise ValueError(
                    f"the cache holds {name} [B, Hkv, L, D] = {expected}, got {list(states.shape)}"
                )
            if states.dtype != self.dtype or states.device != self.device:
                raise ValueError(
                    f"the cache holds {name} in {self.dtype} on {self.device}, got {states.dtype} "
                    f"on {states.device}: reset() it before another dtype or device"
                )

    def make_room(self, tokens: int) -> None:
        """Room for so many tokens in all; see update."""
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(
                f"the cache has a capacity of {self.capacity} tokens and holds {self.length}: "
                f"there is no room for {tokens - self.length} more; nothing was appended"
            )
        needed = self.layout.packed_tokens(tokens)
        if needed > self.packed[0].num_tokens:
            batch, heads = self.packed[0].codes.shape[:2]
            rows = needed + max(needed // _GROWTH, _LEAST_GROWTH)
            grown = self._empty_buffers(batch, heads, rows)
            for name, live in self.live_buffers().items():
                grown[name][:, :, : live.shape[2]] = live
            self._hold(grown)

    def live_buffers(self) -> dict[str, Tensor]:
        """The rows of the buffers that hold tokens."""
        held = self.layout.packed_tokens(self.length)
        return {
            name: self.buffers[name][:, :, : held // rows.tokens]
            for name, rows in self.layout.buffers().items()
        }

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:
        """What get_max_length is called in earlier versions of transformers."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens.

        What then belongs into the window and was packed already comes back from its codes, with the
        error of packing; whatever is packed stays packed as it is.

        Raises:
            ValueError: a positive number, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative one, got "
                f"{tokens_to_remove}"
            )
        if -tokens_to_remove > self.length:
            raise ValueError(f"the cache holds {self.length} tokens, {-tokens_to_remove} cannot go")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.length + tokens_to_remove
        for packed, window in zip(self.packed, self.windows.values(), strict=False):
            _refill(packed, window, self.length, length)
        self.length = length

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
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.windows = {name: function(tensor) for name, tensor in self.windows.items()}
            self._hold({name: function(tensor) for name, tensor in self.buffers.items()})

    def nbytes(self) -> CacheBytes:
        """What the layer takes, in bytes."""
        if not self.is_initialized:
            return CacheBytes()
        batch, heads = self.packed[0].codes.shape[:2]
        codes, params = (batch * heads * n for n in self.layout.split_bytes(self.length))
        window = sum(tensor.nbytes for tensor in self.windows.values())
        held = sum(tensor.nbytes for tensor in self.buffers.values())
        return CacheBytes(codes, params, window, 0, held - codes - params)


def _refill(packed: PackedKV, window: Tensor, before: int, after: int) -> None:
    """Puts into the window what a cache of `after` tokens has there, and one of `before` packed."""
    form, size = packed.format, window.shape[2]
    first = packed_tokens(form.axis, size, after)
    last = min(packed_tokens(form.axis, size, before), after)
    if first >= last:
        return
    # Windows hold rotated rows, so the codes are not rotated back.
    group = form.group_size if form.axis == "token" else 1
    stop = -(-last // group) * group
    rows = PackedKV(
        packed.codes[:, :, first:stop],
        packed.params[:, :, first // group : stop // group],
        replace(form, rotated=False),
    )
    unpacked = tokred.kv_unpack(rows, window.dtype)[:, :, : last - first]
    window[:, :, torch.arange(first, last, device=window.device) % size] = unpacked
