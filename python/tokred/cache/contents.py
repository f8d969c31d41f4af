"""The tensors of one layer of a packed cache, and what appending and cropping make of them.

Contents are not changed but replaced, so that a call which fails leaves those it began with. The
one exception is a token that is appended alone: it is written in place, as decoding appends them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tokred
from tokred.ops.kv_pack import PackedKV, PackFormat, packed_tokens

from .storage import Layout, rows

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# A mean of fewer keys is closer to these keys than to those that follow.
_MIN_MEAN_KEYS = 16


@dataclass(frozen=True, eq=False)
class Contents:
    """The keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] of a layer.

    packed: keys and values, with room for more tokens.
    windows: "key" and "value", the last tokens in full precision, as `kv_append` keeps them;
        without a window there are none.
    key_mean: [B, Hkv, 1, D], which has been subtracted from every stored key, or None.
    dtype: of windows and mean; tokens are cast to it before they are packed. device: of the tokens.
    """

    layout: Layout
    packed: tuple[PackedKV, PackedKV]
    windows: dict[str, Tensor]
    key_mean: Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def empty(
        cls,
        layout: Layout,
        batch: int,
        heads: int,
        room: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Contents:
        """Contents without tokens, with room for `room` packed ones."""
        packed = layout.empty(batch, heads, room, device)
        dims = {"key": layout.head_dim, "value": layout.value_dim} if layout.window > 0 else {}
        dims = {name: dim for name, dim in dims.items() if dim > 0}
        windows = {
            name: torch.zeros(batch, heads, layout.window, dim, dtype=dtype, device=device)
            for name, dim in dims.items()
        }
        return cls(layout, packed, windows, None, dtype, device)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.packed[0].codes.shape[0]

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.packed[0].codes.shape[1]

    @property
    def room(self) -> int:
        """Packed tokens that there is room for."""
        return self.packed[0].num_tokens

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names they have in files."""
        named = {f"{name}_window": tensor for name, tensor in self.windows.items()}
        for name, side in zip(("key", "value")[: self.layout.sides], self.packed, strict=False):
            named |= {f"{name}_codes": side.codes, f"{name}_params": side.params}
        return named if self.key_mean is None else {**named, "key_mean": self.key_mean}

    def live(self, length: int) -> dict[str, Tensor]:
        """As `tensors`, views without the room beyond `length` tokens."""
        return replace(self, packed=self.layout.live(self.packed, length)).tensors()

    def map(self, function: Callable[[Tensor], Tensor]) -> Contents:
        """The function applied to every tensor, the first dimension of which is the batch."""
        keys, values = (side.map(function) for side in self.packed)
        return replace(
            self,
            packed=(keys, values),
            windows={name: function(tensor) for name, tensor in self.windows.items()},
            key_mean=None if self.key_mean is None else function(self.key_mean),
        )

    def with_mean(self, key_mean: Tensor) -> Contents:
        """The same with another mean of the keys."""
        return replace(self, key_mean=key_mean)

    def widened(self, dtype: torch.dtype) -> Contents:
        """The same with windows and mean in a wider dtype."""
        if dtype == self.dtype:
            return self
        windows = {name: tensor.to(dtype) for name, tensor in self.windows.items()}
        mean = None if self.key_mean is None else self.key_mean.to(dtype)
        return replace(self, windows=windows, key_mean=mean, dtype=dtype)

    def with_room(self, length: int, room: int) -> Contents:
        """The same `length` tokens with room for `room` packed ones at least."""
        packed = self.layout.empty(self.batch, self.heads, room, self.packed[0].codes.device)
        held = self.layout.live(self.packed, length)
        for old, new in zip(held, self.layout.live(packed, length), strict=True):
            new.codes.copy_(old.codes)
            new.params.copy_(old.params)
        return Contents(self.layout, packed, self.windows, self.key_mean, self.dtype, self.device)

    def appended(self, length: int, keys: Tensor, values: Tensor) -> Contents:
        """Contents of `length` tokens and then these keys [B, Hkv, L, D] and values, which fit.

        Only room that holds no tokens is written, and where L = 1 the window. The keys' mean is
        chosen with the first tokens that are packed.
        """
        contents = self
        if self.key_mean is None and self._first_packed(length, length + keys.shape[2]):
            mean = self._mean(length, keys)
            windows = self.windows
            if "key" in windows:
                moved = windows["key"] - _rotated(mean, self.layout.key)
                windows = {**windows, "key": moved}
            contents = Contents(self.layout, self.packed, windows, mean, self.dtype, self.device)
        if contents.key_mean is not None:
            keys = keys - contents.key_mean
        if keys.shape[2] == 1:
            contents._append_one(length, keys, values)
            return contents
        windows = {name: tensor.clone() for name, tensor in contents.windows.items()}
        contents = Contents(
            self.layout, self.packed, windows, contents.key_mean, self.dtype, self.device
        )
        tokred.kv_append(keys, self.packed[0], length, windows.get("key"))
        if self.layout.sides > 1:
            tokred.kv_append(values, self.packed[1], length, windows.get("value"))
        return contents

    def _append_one(self, length: int, keys: Tensor, values: Tensor) -> None:
        key, value = self.windows.get("key"), self.windows.get("value")
        if self.layout.sides == 1:
            tokred.kv_append(keys, self.packed[0], length, key)
            return
        if key is None or torch.compiler.is_compiling():
            tokred.kv_append(keys, self.packed[0], length, key)
            tokred.kv_append(values, self.packed[1], length, value)
            return
        row = length % key.shape[2]
        kept = torch.select_copy(key, 2, row)
        tokred.kv_append(keys, self.packed[0], length, key)
        try:
            tokred.kv_append(values, self.packed[1], length, value)
        except BaseException:
            key[:, :, row] = kept
            raise

    def _first_packed(self, before: int, after: int) -> bool:
        """Whether packing begins, with keys enough for a mean."""
        if not self.layout.center or after < _MIN_MEAN_KEYS:
            return False
        axis, window = self.layout.key.axis, self.layout.window
        return packed_tokens(axis, window, before) == 0 < packed_tokens(axis, window, after)

    def _mean(self, length: int, keys: Tensor) -> Tensor:
        """The mean of these and all earlier keys, none of them packed; 0 where it is not finite."""
        total = keys.sum(2, keepdim=True, dtype=torch.float32)
        if length > 0:
            held = self.windows["key"][:, :, :length].sum(2, keepdim=True, dtype=torch.float32)
            total = total + _rotated(held, self.layout.key)  # the rotation is its own inverse
        mean = total / (length + keys.shape[2])
        return torch.where(mean.isfinite(), mean, 0).to(self.dtype)

    def cropped(self, before: int, after: int) -> Contents:
        """The first `after` of `before` tokens; what the window lacks is unpacked from codes."""
        windows = {name: tensor.clone() for name, tensor in self.windows.items()}
        for packed, window in zip(self.packed, windows.values(), strict=False):
            _refill(packed, window, before, after)
        return replace(self, windows=windows, key_mean=self.key_mean if after > 0 else None)


def _rotated(x: Tensor, form: PackFormat) -> Tensor:
    """x [B, H, 1, D], rotated where packed rows are: `kv_append` does so with what it appends."""
    if not form.rotated:
        return x
    window = torch.empty_like(x)
    nothing = PackFormat(8, 16, rotated=True).empty(x.shape[0], x.shape[1], 0, x.shape[3], x.device)
    tokred.kv_append(x, nothing, 0, window)
    return window


def _refill(packed: PackedKV, window: Tensor, before: int, after: int) -> None:
    """Unpacks into the window what it has to hold after a crop, and was packed before."""
    form, size = packed.format, window.shape[2]
    first = packed_tokens(form.axis, size, after)
    last = min(packed_tokens(form.axis, size, before), after)
    if first >= last:
        return
    group = form.group_size if form.axis == "token" else 1
    codes = rows(packed, first, -(-last // group) * group)
    # Windows hold rotated rows, so the codes are not rotated back.
    codes = replace(codes, format=replace(form, rotated=False))
    unpacked = tokred.kv_unpack(codes, window.dtype)[:, :, : last - first]
    window[:, :, torch.arange(first, last, device=window.device) % size] = unpacked
