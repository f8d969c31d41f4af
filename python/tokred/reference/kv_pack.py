"""Low-bit storage of keys and values, in plain torch; its bytes: csrc/kv_pack/layout.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred.ops.kv_pack import PackedKV, PackFormat, packed_tokens

__all__ = ["kv_append", "kv_pack", "kv_unpack"]

_MAX_PARAM = 65504.0
# The positive levels of a codebook by its bits, in 1/32 of the root mean square.
_GAUSSIAN_LEVELS = {1: (26,), 2: (14, 48), 3: (8, 24, 43, 69), 4: (4, 12, 21, 30, 40, 52, 66, 87)}


def hadamard(x: Tensor) -> Tensor:
    """Rotates rows [.., D], as many channels at a time as the largest power of two dividing D."""
    size = x.shape[-1] & -x.shape[-1]
    rows = x.unflatten(-1, (-1, size))
    step = 1
    while step < size:
        pairs = rows.unflatten(-1, (-1, 2, step))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        rows = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return (rows * torch.tensor(size**-0.5, dtype=x.dtype, device=x.device)).flatten(-2)


def code_places(head_dim: int, bits: int) -> tuple[list[int], list[int]]:
    """The byte and the shift of every channel in a row of 1, 2, 4 or 8 bits."""
    size, run, first = head_dim * bits // 8, 16, 0
    places: list[tuple[int, int]] = []
    while first < size:
        while run > size - first:
            run //= 2
        places += [(first + i, bits * plane) for plane in range(8 // bits) for i in range(run)]
        first += run
    return [byte for byte, _ in places], [shift for _, shift in places]


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., D] as rows of bytes."""
    if bits == 3:
        return torch.cat([_to_bytes(codes & 3, 2), _to_bytes(codes >> 2, 1)], -1)
    byte, shift = (torch.tensor(x, device=codes.device) for x in code_places(codes.shape[-1], bits))
    rows = codes.new_zeros(*codes.shape[:-1], codes.shape[-1] * bits // 8)
    return rows.index_add(-1, byte, codes << shift)


def _from_bytes(rows: Tensor, head_dim: int, bits: int) -> Tensor:
    if bits == 3:
        low, high = rows.split([head_dim // 4, head_dim // 8], -1)
        return _from_bytes(low, head_dim, 2) + 4 * _from_bytes(high, head_dim, 1)
    byte, shift = (torch.tensor(x, device=rows.device) for x in code_places(head_dim, bits))
    return rows[..., byte] >> shift & (1 << bits) - 1


def _grouped(x: Tensor, form: PackFormat) -> Tensor:
    """[B, H, N, D] with the numbers of a group last."""
    if form.axis == "channel":
        return x.unflatten(3, (-1, form.group_size))
    return x.unflatten(2, (-1, form.group_size)).transpose(3, 4)


def _ungrouped(x: Tensor, form: PackFormat) -> Tensor:
    return x.flatten(3) if form.axis == "channel" else x.transpose(3, 4).flatten(2, 3)


def gaussian_levels(bits: int) -> Tensor:
    """int8 [1, 2^bits]: the levels of a codebook to which none were given."""
    positive = _GAUSSIAN_LEVELS[bits]
    return torch.tensor([[-x for x in reversed(positive)] + list(positive)], dtype=torch.int8)


def _levels(levels: Tensor | None, bits: int, device: torch.device) -> Tensor:
    """[H | 1, 2^bits] as integers."""
    return (gaussian_levels(bits).to(device) if levels is None else levels).int()


def _nearest(x: Tensor, form: PackFormat, levels: Tensor | None) -> tuple[Tensor, Tensor, None]:
    """As _quantize, of a codebook."""
    size = torch.where(x.isfinite(), x.abs(), 0).clamp(max=2.0**40).unflatten(-1, (-1, 16))
    total = torch.zeros_like(size[..., 0, :])
    for i in range(size.shape[-2]):
        total = total + size[..., i, :] * size[..., i, :]
    while total.shape[-1] > 1:
        low, high = total.chunk(2, -1)
        total = low + high
    scale = (total / x.shape[-1]).sqrt() / 32
    ratio = (x / scale).masked_fill(scale == 0, 0).nan_to_num(0, torch.inf, -torch.inf)
    table = _levels(levels, form.bits, x.device)
    midpoints = (table[:, 1:] + table[:, :-1]) / 2
    codes = (ratio[..., None] > midpoints[None, :, None, None, None]).sum(-1)
    return codes, scale, None


def _quantize(
    x: Tensor, form: PackFormat, levels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int64 [.., group], and the scale and offset [.., 1], of float32 groups."""
    if form.scheme == "codebook":
        return _nearest(x, form, levels)
    largest_code = 2**form.bits - 1
    finite = x.isfinite()
    low = torch.where(finite, x, torch.inf).amin(-1, keepdim=True)
    high = torch.where(finite, x, -torch.inf).amax(-1, keepdim=True)
    # The sum turns -0 into 0: min and max do not tell them apart.
    low, high = (torch.where(finite.any(-1, keepdim=True), t, 0.0) + 0.0 for t in (low, high))
    offset: Tensor | None = None
    if form.scheme in ("asymmetric", "zero_point"):
        if form.scheme == "zero_point":
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / largest_code
        zero = ((0.0 - low) / scale).masked_fill(scale == 0, 0).round()
        offset = low if form.scheme == "asymmetric" else zero
    else:
        largest = torch.maximum(high, 0.0 - low)
        scale = largest / (448 if form.scheme == "fp8" else 2 ** (form.bits - 1) - 1)

    def ratio(numerator: Tensor) -> Tensor:
        return (numerator / scale).masked_fill(scale == 0, 0).nan_to_num(0, torch.inf, -torch.inf)

    if form.scheme == "asymmetric":
        codes = ratio(x - low).clamp(0, largest_code).round()
    elif form.scheme == "zero_point":
        assert offset is not None
        codes = (ratio(x).round() + offset).clamp(0, largest_code)
    elif form.scheme == "symmetric":
        half = 2 ** (form.bits - 1)
        codes = ratio(x).round().clamp(-half, half - 1) + half
    else:
        numbers = ratio(x).clamp(-448, 448).to(torch.float8_e4m3fn)
        codes = numbers.contiguous().view(torch.uint8)
    return codes.long(), scale, offset


def _pack(x: Tensor, form: PackFormat, levels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and params of float32 rows that are rotated where the format is."""
    codes, scale, offset = _quantize(_grouped(x, form), form, levels)
    params = scale if offset is None else torch.cat([scale, offset], -1)
    # [B, H, rows, groups, 1 | 2] to a row of scales and then offsets.
    params = params.clamp(-_MAX_PARAM, _MAX_PARAM).transpose(3, 4).flatten(3)
    rows = _to_bytes(_ungrouped(codes, form), form.bits)
    return rows.to(torch.uint8), params.to(torch.float16)


def kv_pack(
    x: Tensor,
    bits: int,
    group_size: int,
    axis: str = "channel",
    scheme: str = "asymmetric",
    rotate: bool = False,
    levels: Tensor | None = None,
) -> PackedKV:
    """See tokred.kv_pack."""
    form = PackFormat(bits, group_size, axis, scheme, rotate)
    rows = hadamard(x.float()) if rotate else x.float()
    return PackedKV(*_pack(rows, form, levels), form, levels)


def kv_unpack(packed: PackedKV, dtype: torch.dtype = torch.float32) -> Tensor:
    """See tokred.kv_unpack; also to float64."""
    form, wide = packed.format, torch.promote_types(dtype, torch.float32)
    numbers = _from_bytes(packed.codes.long(), packed.head_dim, form.bits)
    if form.scheme == "fp8":
        numbers = numbers.to(torch.uint8).view(torch.float8_e4m3fn)
    elif form.scheme == "codebook":
        table = _levels(packed.levels, form.bits, numbers.device)
        heads = torch.arange(numbers.shape[1], device=numbers.device) % table.shape[0]
        numbers = table[heads[:, None, None], numbers]
    codes = _grouped(numbers.to(wide), form)
    scale = packed.scale.to(wide)[..., None]
    minimum = 0.0 if packed.minimum is None else packed.minimum.to(wide)[..., None]
    if form.scheme == "asymmetric":
        x = scale * codes + minimum
    elif form.scheme == "zero_point":
        x = scale * (codes - minimum)
    elif form.scheme == "symmetric":
        x = scale * (codes - 2 ** (form.bits - 1))
    else:
        x = scale * codes
    x = _ungrouped(x, form)
    return (hadamard(x) if form.rotated else x).to(dtype)


def kv_append(
    x: Tensor,
    packed: PackedKV,
    length: int,
    window: Tensor | None = None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    """See tokred.kv_append."""
    form, new = packed.format, x.shape[2]
    window = x[:, :, :0] if window is None else window
    rows = window.shape[2]
    capacity = packed.num_tokens if slots is None else slots.shape[1]
    arriving = hadamard(x.float()) if form.rotated else x.float()
    for item in range(x.shape[0]):
        held = length if lengths is None else int(lengths[item])
        first = packed_tokens(form.axis, rows, held)
        last = packed_tokens(form.axis, rows, held + new)
        if held < 0 or last > capacity:
            continue
        if last > first:
            tokens = [
                arriving[item, :, t - held] if t >= held else window[item, :, t % rows].float()
                for t in range(first, last)
            ]
            codes, params = _pack(torch.stack(tokens, 1)[None], form, packed.levels)
            _store(packed, item, range(first, last), codes[0], params[0], slots)
        for t in range(max(last, held), held + new):
            window[item, :, t % rows] = arriving[item, :, t - held].to(window.dtype)


def _store(
    packed: PackedKV,
    item: int,
    tokens: range,
    codes: Tensor,
    params: Tensor,
    slots: Tensor | None,
) -> None:
    """Writes the rows of an item's tokens where they have a place."""
    size = packed.format.group_size if packed.format.axis == "token" else 1
    pool = 0 if slots is not None else item
    for i, t in enumerate(tokens):
        slot = t if slots is None else int(slots[item, t])
        if not 0 <= slot < packed.num_tokens:
            continue
        packed.codes[pool, :, slot] = codes[:, i]
        if t % size == 0:
            packed.params[pool, :, slot // size] = params[:, i // size]
