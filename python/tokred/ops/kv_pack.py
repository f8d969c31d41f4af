"""Low-bit storage of keys and values: wrappers, fake kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._library import check_tensor
from .placements import WRITES, not_sharded, sharded
from .registration import call, call_in_place, follow_under_autocast, without_gradient, writes
from .symbolic import check_dim, check_writable

__all__ = ["PackFormat", "PackedKV", "Records", "kv_append", "kv_pack", "kv_unpack"]

_ops = torch.ops.tokred

BITS = (1, 2, 3, 4, 8)

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class PackFormat:
    """How numbers become codes.

    bits: 1, 2, 3, 4 or 8.
    group_size: numbers that share a scale. Along channels a multiple of 16 that divides the head
        dimension; along tokens any divisor of the tokens.
    axis: "channel", groups of neighbouring channels of one token (KIVI's values), or "token",
        groups of tokens of one channel (KIVI's keys).
    scheme: "asymmetric" (scale and minimum, KIVI), "zero_point" (scale and integer zero),
        "symmetric" (scale), "fp8" (scale and e4m3 numbers), or "codebook" (scale and a table of
        2^bits levels, up to 4 bits, along channels).
    rotated: rows are packed after a Hadamard rotation, which spreads outliers over the channels.
    """

    bits: int
    group_size: int
    axis: str = "channel"
    scheme: str = "asymmetric"
    rotated: bool = False

    @property
    def has_offset(self) -> bool:
        return self.scheme in ("asymmetric", "zero_point")

    def code_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one token and head."""
        return head_dim * self.bits // 8

    def params_shape(self, tokens: int, head_dim: int) -> tuple[int, int]:
        """Rows and columns of the params of one head."""
        columns = head_dim if self.axis == "token" else head_dim // self.group_size
        rows = tokens // self.group_size if self.axis == "token" else tokens
        return rows, columns * (2 if self.has_offset else 1)

    def token_bytes(self, head_dim: int) -> float:
        """Bytes of one token and head, params included."""
        rows, columns = self.params_shape(self.group_size, head_dim)
        return self.code_bytes(head_dim) + 2 * rows * columns / self.group_size

    def empty(
        self,
        batch: int,
        heads: int,
        tokens: int,
        head_dim: int,
        device: torch.device | str | None = None,
    ) -> PackedKV:
        """Zeroed room for so many packed tokens (a multiple of group_size along tokens)."""
        shape = (batch, heads, tokens, self.code_bytes(head_dim))
        codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        rows = (batch, heads, *self.params_shape(tokens, head_dim))
        return PackedKV(codes, torch.zeros(rows, dtype=torch.float16, device=device), self)


@dataclass(frozen=True)
class PackedKV:
    """Packed keys or values [B, H, N, D]; the bytes are described in csrc/kv_pack/layout.h.

    codes: uint8 [B, H, N, D * bits / 8].
    params: float16 [B, H, N, columns] along channels, [B, H, N / group_size, columns] along tokens;
        a row holds the scales of its groups, then their offsets where the scheme has them.
    levels: int8 [H | 1, 2^bits] of a codebook, or None for those of normally distributed numbers.
    All may be views with any strides but in the last dimension.
    """

    codes: Tensor
    params: Tensor
    format: PackFormat
    levels: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedKV:
        """A copy whose codes and params are the function's results for them."""
        return replace(self, codes=function(self.codes), params=function(self.params))

    @property
    def head_dim(self) -> int:
        return self.codes.shape[3] * 8 // self.format.bits

    @property
    def num_tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def scale(self) -> Tensor:
        groups = self.params.shape[3] // (2 if self.format.has_offset else 1)
        return self.params[..., :groups]

    @property
    def minimum(self) -> Tensor | None:
        """The offsets: minima, or integer zeros; None where the scheme has none."""
        groups = self.params.shape[3] // 2
        return self.params[..., groups:] if self.format.has_offset else None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.params.nbytes

    def arguments(self) -> tuple[Tensor, Tensor, int, int, str, str, bool]:
        """The arguments by which ops take packed tensors, except the levels."""
        f = self.format
        return self.codes, self.params, f.bits, f.group_size, f.axis, f.scheme, f.rotated


@dataclass(frozen=True)
class Records:
    """Packed keys and values of one token and head side by side, both grouped along channels.

    What is read of a token then lies together: [key codes][value codes][key params][value params],
    144 bytes for 128 channels in 4 bits and groups of 64, where codes alone would be gathered in
    rows of 64 bytes.
    """

    key: PackFormat
    value: PackFormat
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for form in (self.key, self.value):
            if form.axis != "channel":
                raise ValueError(f"records need groups along channels, got axis {form.axis!r}")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Bytes of the parts of a record."""
        return (
            self.key.code_bytes(self.key_dim),
            self.value.code_bytes(self.value_dim),
            2 * self.key.params_shape(1, self.key_dim)[1],
            2 * self.value.params_shape(1, self.value_dim)[1],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of a record, a multiple of 8."""
        return -(-sum(self.parts) // 8) * 8

    def views(self, rows: Tensor) -> tuple[PackedKV, PackedKV]:
        """The keys and the values in uint8 [B, H, N, nbytes]."""
        parts = rows[..., : sum(self.parts)].split(self.parts, 3)
        key_codes, value_codes, key_params, value_params = parts
        return (
            PackedKV(key_codes, key_params.view(torch.float16), self.key),
            PackedKV(value_codes, value_params.view(torch.float16), self.value),
        )

    def empty(
        self, batch: int, heads: int, tokens: int, device: torch.device | str | None = None
    ) -> tuple[PackedKV, PackedKV]:
        """Zeroed room for so many packed tokens."""
        shape = (batch, heads, tokens, self.nbytes)
        return self.views(torch.zeros(shape, dtype=torch.uint8, device=device))


def packed_tokens(axis: str, window: int, tokens: int) -> int:
    """How many of a cache's tokens are packed, the others being in its window."""
    if window == 0:
        return tokens
    if axis == "token":
        return max(tokens - 1, 0) // window * window
    return max(tokens - window, 0)


def check_packed(name: str, value: Any) -> None:
    """Raises a TypeError unless it is a PackedKV."""
    if not isinstance(value, PackedKV):
        raise TypeError(f"{name} must be a PackedKV, got {type(value).__name__}")


def kv_pack(
    x: Tensor,
    bits: int,
    group_size: int,
    axis: str = "channel",
    scheme: str = "asymmetric",
    rotate: bool = False,
    levels: Tensor | None = None,
) -> PackedKV:
    """Packs keys or values into codes of a few bits with a scale for every group.

    asymmetric: scale = (max - min) / (2^bits - 1), code = round((x - min) / scale), as KIVI
    (arXiv:2402.02750); zero_point: the range contains 0, which is a code; symmetric: scale =
    max |x| / (2^(bits - 1) - 1); fp8: e4m3 numbers with scale = max |x| / 448; codebook: scale =
    sqrt(mean x^2) / 32, code = the nearest of the levels to x / scale. In float32, halves to even;
    scales and offsets are stored in float16 and saturate at its range. A group of equal numbers
    has scale 0, but for a codebook (asymmetric: they are stored exactly up to float16). NaN packs
    as 0 (asymmetric: as the minimum), inf as the largest code, and neither moves the others'
    scale.

    Args:
        x: [B, H, N, D] float32, float16 or bfloat16; any outer strides, the last dimension
            contiguous; D a multiple of 16 up to 576.
        bits: 1, 2, 3, 4 or 8; at least 2 for symmetric, 8 for fp8, at most 4 for codebook.
        group_size: along channels a multiple of 16 that divides D, along tokens a divisor of N.
        axis: "channel" or "token"; "channel" for codebook.
        scheme: "asymmetric", "zero_point", "symmetric", "fp8" or "codebook".
        rotate: rotates every row by a Hadamard matrix first (QuaRot, arXiv:2404.00456), as large
            as the largest power of two that divides D; `kv_unpack` and attention undo it.
        levels: int8 [H | 1, 2^bits] of a codebook, for every head or for all, ascending, in 1/32 of
            the root mean square of a group: (table * 32).round().to(torch.int8). By default those
            of Lloyd and Max for normally distributed numbers, which the channels of a rotated row
            nearly are: with rotate and one group a row this is TurboQuant for the mean square error
            (arXiv:2504.19874), with a Hadamard matrix in place of a random rotation, and without
            its extra bit for unbiased products. With fewer than 256 steps a level is the same
            number in every precision and kernel; rounding them adds less than 1 % to the error of
            4 bits.

    Returns:
        PackedKV. An element is off by at most half a scale, and the rounding of the params; of a
        codebook by half the distance of two levels, beyond the outer ones by more.

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
        ValueError: x requires grad.

    Complexity: one read of x, one write of the codes.
    """
    codes, params = call(_ops.kv_pack.default, x, bits, group_size, axis, scheme, rotate, levels)
    return PackedKV(codes, params, PackFormat(bits, group_size, axis, scheme, rotate), levels)


def kv_unpack(
    packed: PackedKV, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """What the codes stand for, [B, H, N, D].

    Args:
        dtype: float32, float16 or bfloat16; float32, or that of out, where None.
        out: [B, H, N, D] to be written and returned. The tokens of a head have no gaps, heads and
            items may lie apart: out = buffer[:, :, :N]. On the CPU a large result that is fresh
            takes longer to get from the system than to compute.

    Raises:
        ValueError: codes and params that do not fit each other or the format; an out of another
            shape or device, or with strides that do not fit.
        ValueError: another dtype, one that is not out's, or an input that requires grad.
        TypeError: packed is no PackedKV.

    Complexity: one read of the codes, one write of the result. `packed_attention` does not need it.
    """
    check_packed("packed", packed)
    if out is not None:
        check_tensor("out", out)
        if dtype not in (None, out.dtype):
            raise ValueError(f"dtype must be that of out, {out.dtype}, or None, got {dtype}")
        call_in_place(_ops.kv_unpack_into.default, (out,), *packed.arguments(), out, packed.levels)
        return out
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPE_NAMES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    name = _DTYPE_NAMES[dtype]
    return call(_ops.kv_unpack.default, *packed.arguments(), name, packed.levels)


def kv_append(
    x: Tensor,
    packed: PackedKV,
    length: int,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """Appends tokens to a packed cache, in place.

    Beside the packed tokens a cache may keep its last ones in full precision, in a window of W
    rows, token t in row t % W. Along channels these are the last W tokens, and every new token
    packs the oldest. Along tokens the window fills up, and is packed as a whole when the next token
    arrives (KIVI, arXiv:2402.02750). Tokens enter a rotated cache rotated, the window included.

    Args:
        x: [B, H, L, D], L any number; the last dimension contiguous.
        packed: the cache's codes and params with room for N tokens, written.
        length: tokens that it holds now, the window's included; where lengths is given, their
            maximum.
        window: [B, H, W, D] in the dtype of x (under autocast x follows it), written; along tokens
            W is a multiple of group_size.
        lengths: int32 [B], tokens of each row of the batch; not changed. Rows that have no room
            left, or a negative length, are left as they are.
        slots: int32 [B, capacity], where each row's tokens are in a pool that all rows share: codes
            is then [1, H, S, ..]. Along tokens a page is a multiple of group_size slots in order.

    Raises:
        ValueError: no room for the tokens (the cache is unchanged), or naming the argument whose
            shape, dtype, device or value does not fit.
        ValueError: x or what is written requires grad.
        TypeError: packed is no PackedKV.

    Complexity: one read of x and of the window's rows that are packed.
    """
    check_packed("packed", packed)
    f = packed.format
    written = [packed.codes, packed.params]
    if window is not None:
        written.append(window)
    call_in_place(
        _ops.kv_append.default,
        written,
        x,
        packed.codes,
        packed.params,
        window,
        length,
        f.bits,
        f.group_size,
        f.axis,
        f.scheme,
        f.rotated,
        lengths,
        slots,
        packed.levels,
    )


def check_bits(name: str, bits: int) -> None:
    """Refuses a number of bits that no code has, as the kernels do."""
    torch._check(bits in BITS, lambda: f"{name} must be 1, 2, 3, 4 or 8, got {bits}")


@torch.library.register_fake("tokred::kv_pack")
def _kv_pack_fake(
    x: Tensor,
    bits: int,
    group_size: int,
    axis: str,
    scheme: str,
    rotate: bool,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() == 4, lambda: f"x must be [B, H, N, D], got {x.dim()}-D")
    check_bits("bits", bits)
    torch._check(group_size > 0, lambda: f"group_size must be at least 1, got {group_size}")
    batch, heads, tokens, head_dim = x.shape
    form = PackFormat(bits, group_size, axis, scheme, rotate)
    codes = x.new_empty((batch, heads, tokens, form.code_bytes(head_dim)), dtype=torch.uint8)
    shape = (batch, heads, *form.params_shape(tokens, head_dim))
    return codes, x.new_empty(shape, dtype=torch.float16)


@torch.library.register_fake("tokred::kv_unpack")
def _kv_unpack_fake(
    codes: Tensor,
    params: Tensor,
    bits: int,
    group_size: int,
    axis: str,
    scheme: str,
    rotated: bool,
    dtype: str,
    levels: Tensor | None = None,
) -> Tensor:
    check_dim("codes", codes, 4, "[B, H, N, bytes]")
    check_bits("bits", bits)
    torch._check(
        dtype in _DTYPE_NAMES.values(),
        lambda: f"dtype must be float32, float16 or bfloat16, got {dtype!r}",
    )
    shape = (*codes.shape[:3], codes.shape[3] * 8 // bits)
    return codes.new_empty(shape, dtype=getattr(torch, dtype))


@torch.library.register_fake("tokred::kv_unpack_into")
def _kv_unpack_into_fake(
    codes: Tensor,
    params: Tensor,
    bits: int,
    group_size: int,
    axis: str,
    scheme: str,
    rotated: bool,
    out: Tensor,
    levels: Tensor | None = None,
) -> None:
    check_dim("out", out, 4, "[B, H, N, D]")
    check_writable("out", out)


@torch.library.register_fake("tokred::kv_append")
def _kv_append_fake(
    x: Tensor, codes: Tensor, params: Tensor, window: Tensor | None, *args: Any, **kwargs: Any
) -> None:
    for name, tensor in (("codes", codes), ("params", params), ("window", window)):
        if tensor is not None:
            check_dim(name, tensor, 4, "[B, H, N, ..]")
            check_writable(name, tensor)


without_gradient("kv_pack")
without_gradient("kv_unpack")
without_gradient("kv_unpack_into", "kv_unpack with out")
without_gradient("kv_append")
writes("kv_unpack_into")
writes("kv_append")
follow_under_autocast("kv_append", "x", "window")
sharded("kv_pack", "x bhnd, levels hi -> bhnd, bhnp")
sharded("kv_unpack", "codes bhnd, params bhnp, levels hi -> bhnd")
not_sharded("kv_unpack_into", WRITES)
not_sharded("kv_append", WRITES)
