"""Where the bytes of one layer's packed keys and values lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokred.ops.kv_pack import PackedKV, PackFormat, Records, packed_tokens

_MULTIPLE = 16  # of the head dimension, and of groups along channels
_MAX_HEAD_DIM = 256
_TOKEN_GROUP = 32
_CHANNEL_GROUP = {1: 32, 2: 32, 3: 32, 4: 64, 8: 64}  # by bits


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values are packed; see tokred.PackedCache."""

    key_bits: int
    value_bits: int
    key_axis: str
    group_size: int | None
    window: int
    scheme: str
    rotate: bool

    def __post_init__(self) -> None:
        for bits in (self.key_bits, self.value_bits):
            if bits not in (1, 2, 3, 4, 8):
                raise ValueError(f"bits must be 1, 2, 3, 4 or 8, got {bits}")
            if self.scheme == "fp8" and bits != 8:
                raise ValueError(f"scheme 'fp8' needs 8 bits, got {bits}")
            if self.scheme == "symmetric" and bits == 1:
                raise ValueError("scheme 'symmetric' needs at least 2 bits, got 1")
        if self.scheme not in ("asymmetric", "zero_point", "symmetric", "fp8"):
            raise ValueError(
                "scheme must be 'asymmetric', 'zero_point', 'symmetric' or 'fp8', got "
                f"{self.scheme!r}"
            )
        if self.key_axis not in ("channel", "token"):
            raise ValueError(f"key_axis must be 'channel' or 'token', got {self.key_axis!r}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}")
        group = self.group_size or _TOKEN_GROUP
        if self.key_axis == "token" and (self.window == 0 or self.window % group != 0):
            raise ValueError(
                f"with key_axis='token' the window must be a multiple of the {group} tokens of a "
                f"group, got window={self.window}"
            )

    def layout(self, head_dim: int, value_dim: int) -> Layout:
        """The layout of keys and values of these dimensions.

        Raises:
            ValueError: a dimension that cannot be packed, or that the groups do not divide.
        """
        key = self._format(self.key_bits, self.key_axis, head_dim, "head_dim of the keys")
        value = self._format(self.value_bits, "channel", value_dim, "head_dim of the values")
        return Layout(key, value, self.window, head_dim, value_dim)

    def _format(self, bits: int, axis: str, dim: int, name: str) -> PackFormat:
        if dim % _MULTIPLE != 0 or not 0 < dim <= _MAX_HEAD_DIM:
            raise ValueError(
                f"PackedCache needs a head_dim that is a multiple of {_MULTIPLE} up to "
                f"{_MAX_HEAD_DIM}, but the {name} is {dim}: use a transformers.DynamicCache"
            )
        default = _TOKEN_GROUP if axis == "token" else math.gcd(dim, _CHANNEL_GROUP[bits])
        group = self.group_size or default
        if axis == "channel" and (group % _MULTIPLE != 0 or dim % group != 0):
            raise ValueError(
                f"group_size must be a multiple of {_MULTIPLE} that divides the {name}, {dim}, "
                f"got {group}"
            )
        return PackFormat(bits, group, axis, self.scheme, self.rotate)


@dataclass(frozen=True)
class Rows:
    """One buffer [B, H, rows, columns], a row for every `tokens` packed tokens."""

    dtype: torch.dtype
    tokens: int
    columns: int


@dataclass(frozen=True)
class Layout:
    """The buffers of a layer.

    Where keys and values both have groups along channels, a token of a head is one record of bytes,
    as sparse attention gathers tokens; otherwise codes and params of both sides are buffers of
    their own.
    """

    key: PackFormat
    value: PackFormat
    window: int
    head_dim: int
    value_dim: int

    @property
    def interleaved(self) -> bool:
        return self.key.axis == self.value.axis == "channel"

    @property
    def unit(self) -> int:
        """What the number of rows is a multiple of."""
        return self.key.group_size if self.key.axis == "token" else 1

    def buffers(self) -> dict[str, Rows]:
        """The buffers of packed tokens; windows are apart."""
        if self.interleaved:
            return {"records": Rows(torch.uint8, 1, self._records().nbytes)}
        buffers = {}
        sides = (("key", self.key, self.head_dim), ("value", self.value, self.value_dim))
        for name, form, dim in sides:
            group = form.group_size if form.axis == "token" else 1
            columns = form.params_shape(group, dim)[1]
            buffers[f"{name}_codes"] = Rows(torch.uint8, 1, form.code_bytes(dim))
            buffers[f"{name}_params"] = Rows(torch.float16, group, columns)
        return buffers

    def _records(self) -> Records:
        return Records(self.key, self.value, self.head_dim, self.value_dim)

    def views(self, buffers: dict[str, Tensor]) -> tuple[PackedKV, PackedKV]:
        """Packed keys and values in the buffers."""
        if not self.interleaved:
            return (
                PackedKV(buffers["key_codes"], buffers["key_params"], self.key),
                PackedKV(buffers["value_codes"], buffers["value_params"], self.value),
            )
        return self._records().views(buffers["records"])

    def packed_tokens(self, tokens: int) -> int:
        """How many of a cache's tokens the buffers of packed tokens hold."""
        sides = (packed_tokens(form.axis, self.window, tokens) for form in (self.key, self.value))
        return max(sides)

    def split_bytes(self, tokens: int) -> tuple[int, int]:
        """Bytes of codes and of params of one head of a cache of so many tokens."""
        codes = params = 0
        for form, dim in ((self.key, self.head_dim), (self.value, self.value_dim)):
            held = packed_tokens(form.axis, self.window, tokens)
            codes += held * form.code_bytes(dim)
            params += 2 * math.prod(form.params_shape(held, dim))
        return codes, params
