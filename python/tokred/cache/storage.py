"""How a layer's keys and values are packed, and the room they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tokred.ops.kv_pack import PackedKV, PackFormat, packed_tokens

MAX_TOKENS = 2**31 - 1  # that int32 indices can name
_MULTIPLE = 16  # of the head dimension, and of groups along channels
_MAX_HEAD_DIM = 256
_MAX_LATENT_DIM = 576  # of latents, with the rotary part of their keys
_TOKEN_GROUP = 32
_CHANNEL_GROUP = {1: 32, 2: 32, 3: 32, 4: 64, 8: 64}  # by bits
SCHEMES = ("asymmetric", "zero_point", "symmetric", "fp8", "codebook")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "key_bits": int,
    "value_bits": int,
    "key_axis": str,
    "group_size": (int, type(None)),
    "window": int,
    "scheme": str,
    "rotate": bool,
    "center": bool,
}


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
    center: bool

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            value = getattr(self, name)
            # isinstance(True, int) holds, but a bool is no number of bits.
            if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
                raise ValueError(f"{name} must be {_named(types)}, got {value!r}")
        for bits in (self.key_bits, self.value_bits):
            if bits not in (1, 2, 3, 4, 8):
                raise ValueError(f"bits must be 1, 2, 3, 4 or 8, got {bits}")
            if self.scheme == "fp8" and bits != 8:
                raise ValueError(f"scheme 'fp8' needs 8 bits, got {bits}")
            if self.scheme == "symmetric" and bits == 1:
                raise ValueError("scheme 'symmetric' needs at least 2 bits, got 1")
            if self.scheme == "codebook" and bits == 8:
                raise ValueError("scheme 'codebook' has at most 16 levels, 4 bits, got 8")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {list(SCHEMES)}, got {self.scheme!r}")
        if self.key_axis not in ("channel", "token"):
            raise ValueError(f"key_axis must be 'channel' or 'token', got {self.key_axis!r}")
        if self.scheme == "codebook" and self.key_axis == "token":
            raise ValueError("scheme 'codebook' needs key_axis='channel', got 'token'")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if not 0 <= self.window <= MAX_TOKENS:
            raise ValueError(
                f"window must be at least 0 and at most {MAX_TOKENS}, got {self.window}"
            )
        group = self.group_size or _TOKEN_GROUP
        if self.key_axis == "token" and (self.window == 0 or self.window % group != 0):
            raise ValueError(
                f"with key_axis='token' the window must be a multiple of the {group} tokens of a "
                f"group, got window={self.window}"
            )

    def layout(self, head_dim: int, value_dim: int) -> Layout:
        """The layout of keys and values of these dimensions; of latents there are no values, 0.

        Raises:
            ValueError: a dimension that cannot be packed, or that the groups do not divide.
        """
        most = _MAX_HEAD_DIM if value_dim > 0 else _MAX_LATENT_DIM
        name = "head_dim of the keys" if value_dim > 0 else "latent with its rotary part"
        key = self._format(self.key_bits, self.key_axis, head_dim, name, most)
        if value_dim == 0:
            return Layout(key, replace(key, axis="channel"), self.window, False, head_dim, 0)
        name = "head_dim of the values"
        value = self._format(self.value_bits, "channel", value_dim, name, most)
        return Layout(key, value, self.window, self.center, head_dim, value_dim)

    def _format(self, bits: int, axis: str, dim: int, name: str, most: int) -> PackFormat:
        if dim % _MULTIPLE != 0 or not 0 < dim <= most:
            raise ValueError(
                f"PackedCache needs a head_dim that is a multiple of {_MULTIPLE} up to "
                f"{most}, but the {name} is {dim}: use a transformers.DynamicCache"
            )
        default = _TOKEN_GROUP if axis == "token" else math.gcd(dim, _CHANNEL_GROUP[bits])
        if self.scheme == "codebook":
            default = dim
        group = self.group_size or default
        if axis == "channel" and (group % _MULTIPLE != 0 or dim % group != 0):
            raise ValueError(
                f"group_size must be a multiple of {_MULTIPLE} that divides the {name}, {dim}, "
                f"got {group}"
            )
        return PackFormat(bits, group, axis, self.scheme, self.rotate)


def _named(types: type | tuple[type, ...]) -> str:
    names = {int: "an int", str: "a str", bool: "a bool", type(None): "None"}
    return " or ".join(names[each] for each in (types if isinstance(types, tuple) else (types,)))


@dataclass(frozen=True)
class Layout:
    """The formats of a layer's keys and values, and how many of its tokens are packed.

    Codes and params of either side are tensors of their own: attention over all keys, and over
    chosen ones, is quicker so than where they interleave, and torch.compile sees no tensor of two
    dtypes.
    """

    key: PackFormat
    value: PackFormat
    window: int
    center: bool
    head_dim: int
    value_dim: int

    @property
    def sides(self) -> int:
        """2, keys and values, or 1: latents are both."""
        return 1 if self.value_dim == 0 else 2

    @property
    def unit(self) -> int:
        """The room for packed tokens is a multiple of this."""
        return self.key.group_size if self.key.axis == "token" else 1

    def empty(
        self, batch: int, heads: int, tokens: int, device: torch.device
    ) -> tuple[PackedKV, PackedKV]:
        """Zeroed room for at least `tokens` packed tokens."""
        tokens = -(-tokens // self.unit) * self.unit
        return (
            self.key.empty(batch, heads, tokens, self.head_dim, device),
            self.value.empty(batch, heads, tokens, self.value_dim, device),
        )

    def packed_tokens(self, tokens: int) -> int:
        """How many of a cache's tokens need room as packed ones."""
        return max(packed_tokens(form.axis, self.window, tokens) for form in (self.key, self.value))

    def live(self, packed: tuple[PackedKV, PackedKV], tokens: int) -> tuple[PackedKV, PackedKV]:
        """Views without the room beyond the packed ones of `tokens` tokens."""
        keys, values = (
            rows(side, 0, packed_tokens(side.format.axis, self.window, tokens)) for side in packed
        )
        return keys, values

    def split_bytes(self, tokens: int) -> tuple[int, int]:
        """Bytes of codes and of params of one head of a cache of so many tokens."""
        codes = params = 0
        for form, dim in ((self.key, self.head_dim), (self.value, self.value_dim)):
            held = packed_tokens(form.axis, self.window, tokens)
            codes += held * form.code_bytes(dim)
            params += 2 * math.prod(form.params_shape(held, dim))
        return codes, params


def rows(packed: PackedKV, first: int, stop: int) -> PackedKV:
    """The packed tokens first .. stop - 1, whole groups of them, a view."""
    group = packed.format.group_size if packed.format.axis == "token" else 1
    return replace(
        packed,
        codes=packed.codes[:, :, first:stop],
        params=packed.params[:, :, first // group : stop // group],
    )
