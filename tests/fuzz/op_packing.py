"""Cases of kv_pack, kv_unpack, kv_append and of attention and scores on packed keys.

Where the bytes of a code lie is the reference's business; what codes stand for is looked at here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from case import Case, clone, op_case
from compare import Mismatch, bits, near, same
from draw import F32, F64, Draw
from op_attention import attend, bias, full_mask
from op_scoring import REDUCES, key_scores
from torch import Tensor

import tokred
from tokred import PackedKV, PackFormat, reference
from tokred.ops.kv_pack import packed_tokens
from tokred.reference.kv_pack import hadamard

_INT32_ENDS = (-(2**31), 2**31 - 1, -1)


def _format(draw: Draw, dim: int) -> PackFormat:
    axis = draw.choice(["channel", "token"])
    scheme = draw.choice(["asymmetric", "asymmetric", "zero_point", "symmetric", "fp8", "codebook"])
    few = {"symmetric": [2, 3, 4, 8], "codebook": [1, 2, 3, 4]}.get(scheme, [1, 2, 3, 4, 8])
    number = 8 if scheme == "fp8" else draw.choice(few)
    axis = "channel" if scheme == "codebook" else axis
    divisors = [n for n in range(16, dim + 1, 16) if dim % n == 0]
    group = draw.choice(divisors if axis == "channel" else [1, 2, 3, 5, 8, 16, 32])
    return PackFormat(number, group, axis, scheme, draw.chance())


def _dim(draw: Draw, wide: bool = True) -> int:
    if wide and draw.chance(0.05):
        return 16 * draw.choice([17, 20, 32, 36])
    return 16 * draw.choice([1, 2, 3, 4] if draw.small else [1, 2, 3, 4, 5, 6, 7, 8, 8, 10, 13, 16])


def _token_group(form: PackFormat) -> int:
    return form.group_size if form.axis == "token" else 1


def _packed(draw: Draw, batch: int, heads: int, tokens: int, dim: int, f: PackFormat) -> PackedKV:
    """A PackedKV of packed numbers, or of any codes and params."""
    if draw.chance(0.7):
        x = draw.floats((batch, heads, tokens, dim), F32, plain=True)
        levels = _levels(draw, heads, f)
        return reference.kv_pack(x, f.bits, f.group_size, f.axis, f.scheme, f.rotated, levels)
    packed = replace(f.empty(batch, heads, tokens, dim), levels=_levels(draw, heads, f))
    codes = torch.randint(0, 256, packed.codes.shape, generator=draw.generator()).to(torch.uint8)
    if f.scheme == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    params = torch.randn(packed.params.shape, generator=draw.generator()).half()
    return replace(packed, codes=codes, params=params)


def _levels(draw: Draw, heads: int, form: PackFormat) -> Tensor | None:
    """A codebook's levels: its own, or any others, mostly ascending."""
    if form.scheme != "codebook" or draw.chance():
        return None
    shape = (draw.choice([1, heads]), 2**form.bits)
    levels = torch.randint(-128, 128, shape, generator=draw.generator()).to(torch.int8)
    return levels if draw.chance(0.2) else levels.sort(1).values


@op_case
def kv_pack(draw: Draw) -> Case:
    batch, heads, dim = draw.batch(), draw.one_of(0, 1, 2, 3), _dim(draw)
    form = _format(draw, dim)
    tokens = draw.size() if form.axis == "channel" else form.group_size * draw.one_of(0, 1, 2, 5)
    x = draw.floats((batch, heads, tokens, dim), draw.dtype())
    spoiled = draw.chance(0.25)
    x = draw.spoiled(x) if spoiled else x
    some = {"x": x, "bits": form.bits, "group_size": form.group_size, "axis": form.axis,
            "scheme": form.scheme, "rotate": form.rotated}  # fmt: skip
    levels = _levels(draw, heads, form)
    if levels is not None:
        some["levels"] = levels

    def check(out: Any) -> None:
        if not form.rotated:
            expected = reference.kv_pack(**some)
            same([out.codes, bits(out.params)], [expected.codes, bits(expected.params)], "bytes")
        if not spoiled and x.numel() and form.scheme != "codebook":
            _check_round_trip(x, out)

    def call(**inputs: Any) -> PackedKV:
        return replace(tokred.kv_pack(**inputs), levels=None)  # they are arguments, not results

    return Case("kv_pack", some, check=check, call=call, batched=("x",))


def _check_round_trip(x: Tensor, packed: PackedKV) -> None:
    """Half a step, and the rounding of scale and offset to float16."""
    form = packed.format
    steps = {"fp8": 17.0, "zero_point": 1.1}.get(form.scheme, 0.51)
    largest = float(x.double().abs().max()) * (math.sqrt(x.shape[3]) if form.rotated else 1)
    allowed = steps * float(packed.scale.double().max())
    allowed *= math.sqrt(x.shape[3]) if form.rotated else 1
    allowed += (4e-3 if form.bits == 8 else 2e-3) * largest + 1e-7
    error = float((tokred.kv_unpack(packed).double() - x.double()).abs().max())
    if not error <= allowed:
        raise Mismatch(f"unpacked numbers are off by {error:.3g}, allowed {allowed:.3g}")


@op_case
def kv_unpack(draw: Draw) -> Case:
    batch, heads, dim = draw.batch(), draw.one_of(0, 1, 2, 3), _dim(draw)
    form = _format(draw, dim)
    tokens = draw.size() if form.axis == "channel" else form.group_size * draw.one_of(0, 1, 2, 5)
    packed = _packed(draw, batch, heads, tokens, dim, form)
    some = {"packed": packed, "dtype": draw.dtype()}

    def check(out: Tensor) -> None:
        exact, single = (reference.kv_unpack(packed, dtype) for dtype in (F64, F32))
        near(out, exact, single, 1e-6, "against the reference")

    return Case("kv_unpack", some, check=check, batched=("packed",))


@op_case
def kv_unpack_out(draw: Draw) -> Case:
    """Into a part of a buffer, the rest of which stays as it is."""
    case = kv_unpack(draw)
    dtype = case.arguments["dtype"]
    gap, shift = draw.one_of(0, 1, 7, 40), draw.one_of(0, 1, 5)

    def call(packed: PackedKV, dtype: torch.dtype) -> Tensor:
        batch, heads, tokens = packed.codes.shape[:3]
        room = tokens * packed.head_dim + gap
        size, device = shift + batch * heads * room, packed.codes.device
        buffer = torch.full((size,), 123.0, dtype=dtype, device=device)
        strides = (max(heads, 1) * room, room, packed.head_dim, 1)
        shape = batch, heads, tokens, packed.head_dim
        out = buffer.as_strided(shape, strides, shift)
        result = tokred.kv_unpack(packed, out=out).clone()
        out.fill_(123.0)
        if not (buffer == 123.0).all():
            raise Mismatch("kv_unpack(out=) wrote beside out")
        return result

    def check(out: Tensor) -> None:
        same(out, tokred.kv_unpack(case.arguments["packed"], dtype), "out= against a fresh result")

    return replace(case, call=call, check=check)


def _slots(draw: Draw, batch: int, capacity: int, pool: int, page: int, apart: bool) -> Tensor:
    """Pages of the pool, with some entries that are no slot. `apart`: no page is used twice."""
    pages, there = -(-capacity // page), pool // page
    if not there or not batch or not pages:
        return torch.full((batch, capacity), -1, dtype=torch.int32)
    if apart:
        first = torch.randperm(there, generator=draw.generator())[: batch * pages]
    else:
        first = torch.randint(0, there, (batch * pages,), generator=draw.generator())
    slots = first.reshape(batch, pages)[..., None] * page + torch.arange(page)
    slots = slots.reshape(batch, -1)[:, :capacity]
    if draw.chance():
        ends = torch.tensor([*_INT32_ENDS, pool])
        far = ends[torch.randint(0, len(ends), slots.shape, generator=draw.generator())]
        some = torch.rand(slots.shape, generator=draw.generator()) < 0.1
        slots = torch.where(some, far, slots)
    return slots.int().contiguous()


@op_case
def kv_append(draw: Draw) -> Case:
    batch, heads, dim = draw.one_of(1, 2, 3), draw.one_of(1, 2, 3), _dim(draw)
    form, new = _format(draw, dim), draw.one_of(0, 1, 1, 1, 2, 3, 5, 17, 40)
    group, dtype = _token_group(form), draw.dtype()
    by_token = form.axis == "token"
    size = group * draw.one_of(1, 1, 2, 3) if by_token else draw.one_of(0, 0, 1, 3, 8, 32)
    capacity = group * draw.one_of(0, 1, 2, 4) if by_token else draw.one_of(0, 1, 5, 17, 64)
    x = draw.floats((batch, heads, new, dim), dtype)
    some: dict[str, Any] = {"x": draw.spoiled(x) if draw.chance(0.1) else x}
    paged = draw.chance(0.35)
    page = group * draw.one_of(1, 2) if by_token else draw.one_of(1, 4)
    pool = page * -(-max(capacity, 1) // page) * (batch + draw.one_of(0, 1)) if paged else capacity
    some["packed"] = _packed(draw, 1 if paged else batch, heads, pool, dim, form)
    if paged:
        some["slots"] = _slots(draw, batch, capacity, pool, page, apart=True)
        entries = some["slots"][(some["slots"] >= 0) & (some["slots"] < pool)]
        if len(entries.unique()) != len(entries):
            some["slots"] = torch.full_like(some["slots"], -1)
    if size:
        some["window"] = draw.floats((batch, heads, size, dim), dtype, plain=True)
    length = draw.randrange(capacity + size + 1)
    some["length"] = length
    if draw.chance(0.4):
        some["lengths"] = draw.indices((batch,), capacity + size + 3)
    room = packed_tokens(form.axis, size, length + new) <= capacity

    def call(**inputs: Any) -> list[Tensor]:
        held = clone({name: inputs[name] for name in ("packed", "window") if name in inputs})
        try:
            tokred.kv_append(**inputs)
        except RuntimeError:
            if room:
                raise
            same(_contents(inputs), _contents(held), "a refused kv_append")
        else:
            if not room:
                raise Mismatch("kv_append without room did not refuse")
        return [t.clone() for t in _contents(inputs)]

    def check(out: Any) -> None:
        if not room or not bool(some["x"].isfinite().all()):
            return
        expected = clone(some)
        reference.kv_append(**expected)
        if not form.rotated:
            same(out, _contents(expected), "against the reference")

    return Case("kv_append", some, check=check, call=call, loose=("lengths",),
                written=("packed", "window"))  # fmt: skip


def _contents(inputs: dict[str, Any]) -> list[Tensor]:
    window = [inputs["window"]] if inputs.get("window") is not None else []
    return [inputs["packed"].codes, inputs["packed"].params, *window]


def tokens_of(
    packed: PackedKV,
    residual: Tensor | None,
    batch: int,
    dtype: torch.dtype,
    length: int | None = None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A side's tokens [B, H, T, D], unrotated, and which there are, [B, T]."""
    rows = reference.kv_unpack(packed, dtype)
    if slots is not None:
        placed = (slots >= 0) & (slots < packed.num_tokens)
        pool = torch.nn.functional.pad(rows[0], (0, 0, 0, 1))
        rows = pool[:, torch.where(placed, slots, packed.num_tokens).long()].transpose(0, 1)
    else:
        placed = torch.ones(batch, packed.num_tokens, dtype=torch.bool)
    window = rows[:, :, :0].expand(batch, -1, -1, -1) if residual is None else residual
    window = hadamard(window) if packed.format.rotated and residual is not None else window
    if length is None:
        there = torch.cat([placed, placed.new_ones(batch, window.shape[2])], 1)
        return torch.cat([rows, window], 2), there
    size = window.shape[2]
    tokens = rows.new_zeros(batch, rows.shape[1], length, rows.shape[3])
    there = placed.new_zeros(batch, length)
    for b in range(batch):
        held = length if lengths is None else min(max(int(lengths[b]), 0), length)
        first = packed_tokens(packed.format.axis, size, held)
        tokens[b, :, :first], there[b, :first] = rows[b, :, :first], placed[b, :first]
        if size:
            tokens[b, :, first:held] = window[b][:, torch.arange(first, held) % size]
            there[b, first:held] = True
    return tokens, there


def _cache(draw: Draw, both: bool) -> tuple[dict[str, Any], int, PackedKV, PackedKV]:
    """A query and its cache: packed tokens, windows or residuals, pages."""
    batch, (heads, key_heads) = draw.batch(), draw.heads()
    dims = [_dim(draw, wide=both) for _ in range(2)]
    forms = [_format(draw, dim) for dim in dims]
    if not both:
        dims, forms = dims[:1] * 2, forms[:1] * 2
    few = [1, 1, 1, 2, 3, 5, 17]
    queries, dtype = draw.choice(few if draw.small else [*few, 0, 33, 64]), draw.dtype()
    unit = math.lcm(*(_token_group(form) for form in forms))
    some: dict[str, Any] = {"q": draw.floats((batch, heads, queries, dims[0]), dtype)}
    mode = draw.choice(["plain", "cache", "cache", "paged"])
    pool_batch = batch
    if mode == "plain":
        capacity = unit * draw.one_of(0, 1, 2, 4) if unit > 1 else draw.size()
        sizes = [draw.one_of(0, 0, 1, 5, 16)] * 2
        tokens, pool = capacity + sizes[0], capacity
    else:
        sizes = [
            draw.one_of(0, 1, 8, 32) if f.axis == "channel" else f.group_size * draw.one_of(1, 2)
            for f in forms
        ]
        tokens = draw.one_of(0, 1, 2, 3, 16, 17, 33, 64, 65, 100, 129, 200)
        needed = max(
            packed_tokens(f.axis, size, tokens) for f, size in zip(forms, sizes, strict=True)
        )
        pool = capacity = -(-(needed + draw.one_of(0, 0, 3)) // unit) * unit
        some["length"] = tokens
        if draw.chance():
            some["lengths"] = draw.indices((batch,), tokens)
    if mode == "paged":
        page = unit * draw.one_of(1, 2)
        pool, pool_batch = page * -(-max(capacity, 1) // page) * (batch + 1), 1
        some["slots"] = _slots(draw, batch, capacity, pool, page, apart=False)
    sides = [
        _packed(draw, pool_batch, key_heads, pool, dim, form)
        for dim, form in zip(dims, forms, strict=True)
    ]
    for name, size, dim in zip(("residual_k", "residual_v"), sizes, dims, strict=True):
        if size or (mode != "plain" and draw.chance(0.2)):
            some[name] = draw.floats((batch, key_heads, size, dim), dtype, plain=True)
    return some, tokens, *sides


_STATE = ("length", "lengths", "slots")


def _rounding(some: dict[str, Any], packed: PackedKV) -> float:
    """The allowance for the fixed point in which the CPU takes half-precision queries."""
    q, k = some["q"].double(), reference.kv_unpack(packed, F64)
    if not q.numel() or not k.numel():
        return 1e-5
    scale = packed.head_dim**-0.5 if some["scale"] is None else abs(some["scale"])
    logit = float(q.abs().max() * k.abs().sum(-1).max()) * scale
    if some["q"].dtype == F32:
        return 2e-6 * (1 + logit)
    return 2**-15 * logit * 12 * (packed.head_dim**0.5 if packed.format.rotated else 1) + 1e-4


def _batched(names: tuple[str, ...], some: dict[str, Any]) -> tuple[str, ...]:
    return tuple(n for n in names if not ("slots" in some and n.startswith("packed")))


@op_case
def packed_attention(draw: Draw) -> Case:
    some, tokens, k, v = _cache(draw, both=True)
    batch, heads, queries, _ = some["q"].shape
    key_heads = k.codes.shape[1]
    some |= {"packed_k": k, "packed_v": v, "scale": draw.scale(), "causal": draw.chance(0.4)}
    if draw.chance(0.35):
        listed = draw.choice([1, key_heads, heads]) if heads else 1
        shape = batch, listed, draw.choice([1, queries]), draw.size()
        some["indices"] = draw.indices(shape, tokens)
    if draw.chance(0.3):
        some["mask"] = full_mask(draw, some["q"], tokens)
    if draw.chance(0.3):
        some["key_bias"] = bias(draw, some["q"].float(), key_heads, tokens)
    if draw.chance(0.2):
        some["softcap"] = draw.choice([0.5, 5.0, 50.0])

    def plain(
        q: Tensor,
        residual_k: Tensor | None = None,
        residual_v: Tensor | None = None,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        key_bias: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        state = {name: rest[name] for name in _STATE if name in rest}
        keys, there = tokens_of(k, residual_k, batch, q.dtype, **state)
        values, valued = tokens_of(v, residual_v, batch, q.dtype, **state)
        seen = (there & valued)[:, None, None]
        if rest["causal"]:
            held = torch.full((batch, 1, 1), tokens)
            if rest.get("lengths") is not None:
                held = rest["lengths"].clamp(0, tokens)[:, None, None]
            last = torch.arange(queries)[:, None] + held - queries
            seen = seen & (torch.arange(tokens) <= last)[:, None]
        seen = seen if mask is None or mask.is_floating_point() else seen & mask
        times = seen.to(q.dtype).expand(batch, heads, queries, tokens)
        if indices is not None:
            listed = indices.long().repeat_interleave(heads // indices.shape[1], 1)
            listed = listed.expand(-1, -1, queries, -1)
            valid = (listed >= 0) & (listed < tokens)
            counts = torch.zeros(batch, heads, queries, tokens + 1, dtype=q.dtype)
            counts.scatter_add_(3, torch.where(valid, listed, tokens), valid.to(q.dtype))
            times = times * counts[..., :tokens]
        how = key_bias, rest["scale"], rest.get("softcap"), mask
        return attend(q, keys, values, times, *how)

    slack = _rounding(some, k)
    names = ("q", "residual_k", "residual_v", "indices", "mask", "key_bias", "lengths", "slots")
    batched, loose = (
        _batched((*names, "packed_k", "packed_v"), some),
        ("mask", "key_bias", "lengths"),
    )
    return Case("packed_attention", some, plain if slack < 0.05 else None, slack, batched=batched,
                loose=loose, halves=True, refusable=not heads)  # fmt: skip


@op_case
def packed_qk_score(draw: Draw) -> Case:
    some, tokens, k, _ = _cache(draw, both=False)
    some.pop("residual_v", None)
    batch, heads, queries, _ = some["q"].shape
    some |= {"packed_k": k, "reduce": draw.choice(REDUCES), "scale": draw.scale()}
    if draw.chance(0.4):
        some["mask"] = draw.mask((draw.choice([1, batch]), tokens))

    def plain(q: Tensor, residual_k: Tensor | None = None, mask: Any = None, **rest: Any) -> Tensor:
        state = {name: rest[name] for name in _STATE if name in rest}
        keys, there = tokens_of(k, residual_k, batch, q.dtype, **state)
        there = there if mask is None else there & mask
        return key_scores(q, keys, rest["reduce"], None, rest["scale"], None, there)

    slack = _rounding(some, k)
    known = heads and queries and slack < 0.05
    names = ("q", "residual_k", "mask", "lengths", "slots", "packed_k")
    return Case("packed_qk_score", some, plain if known else None, slack,
                batched=_batched(names, some), loose=("mask", "lengths"),
                refusable=not heads or not queries)  # fmt: skip
