"""Cases of the attention ops and of combine_states."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from draw import F32, F64, Draw
from torch import Tensor

# A bias of a key head, one number a key, and what is hidden.
LOOSE = ("key_bias", "mask", "block_mask")
HOW = ("key_bias", "scale", "softcap")  # logits are made
BATCHED = (
    "q", "k", "v", "key_bias", "mask", "query_position", "key_position", "indices", "block_mask",
    "grad_out", "grad_lse", "out", "lse",
)  # fmt: skip


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    times: Tensor,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention in which a key counts `times` [B|1, Hq|1, L, N] for a query.

    A key that counts 0 times, or whose bias is -inf, adds nothing, whatever it holds. A float mask
    is added to the logits; a bool mask must be part of `times`.
    """
    (batch, heads, queries, dim), (key_heads, keys) = q.shape, k.shape[1:3]
    group = heads // max(key_heads, 1)
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = (q @ k.mT) * (max(dim, 1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    times = times.expand(batch, heads, queries, keys)
    seen = times > 0
    if key_bias is not None:
        bias = key_bias.expand(-1, key_heads, -1).repeat_interleave(group, 1)[:, :, None]
        seen = seen & (bias > -torch.inf)
        logits = logits + bias
    if mask is not None and mask.is_floating_point():
        seen = seen & (mask > -torch.inf)
        logits = logits + mask
    logits = logits.masked_fill(~seen, -torch.inf)
    largest = torch.nn.functional.pad(logits.detach(), (0, 1), value=-torch.inf).amax(-1, True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weight = (times * (logits - largest).exp()).masked_fill(~seen, 0)
    total = weight.sum(-1, True)
    empty = total == 0
    share = weight / total.masked_fill(empty, 1)
    hostile = ~v.isfinite().all(-1)  # 0 * inf is NaN
    out = share @ v.masked_fill(hostile[..., None], 0)
    if hostile.any():
        touched = seen & hostile[:, :, None]
        out = out + torch.where(touched.any(-1, True), torch.nan, 0.0)
    lse = largest + total.masked_fill(empty, 1).log()
    return out, lse.masked_fill(empty, -torch.inf)[..., 0]


def seen_by(
    queries: int,
    keys: int,
    causal: bool = False,
    mask: Tensor | None = None,
    query_position: Tensor | None = None,
    key_position: Tensor | None = None,
) -> Tensor:
    """What causal, a bool mask and positions leave, bool [B | 1, Hq | 1, L, N]."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    if query_position is not None:
        seen = seen & (key_position[:, None, None] <= query_position[:, None, :, None]).all(-1)
    return seen


def biased(q: Tensor, k: Tensor, v: Tensor, **some: Any) -> tuple[Tensor, Tensor]:
    how = {name: some[name] for name in (*HOW, "mask") if name in some}
    some = {name: value for name, value in some.items() if name not in HOW}
    return attend(q, k, v, seen_by(q.shape[2], k.shape[2], **some).to(q.dtype), **how)


def blocks(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Tensor, block_q: int, block_k: int, **some: Any
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(q.shape[2]) // block_q
    columns = torch.arange(k.shape[2]) // block_k
    mask = block_mask[:, :, rows][..., columns]
    other = some.pop("mask", None)
    if other is not None:
        mask = other.where(mask, -torch.inf if other.is_floating_point() else False)
    return biased(q, k, v, mask=mask, **some)


def lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_q: int = 1,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    **some: Any,
) -> tuple[Tensor, Tensor]:
    """Every key as often as it is listed; with rope, every place of a list as a key of its own."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    how = {name: some[name] for name in (*HOW, "mask") if name in some}
    some = {name: value for name, value in some.items() if name not in HOW}
    listed = indices.long().repeat_interleave(heads // max(indices.shape[1], 1), 1)
    listed = listed.repeat_interleave(min(block_q, max(queries, 1)), 2)[:, :, :queries]
    valid = (listed >= 0) & (listed < keys)
    seen = seen_by(queries, keys, **some).expand(batch, heads, queries, keys)
    if rope_cos is None or keys == 0:
        times = torch.zeros(batch, heads, queries, keys + 1, dtype=q.dtype)
        times.scatter_add_(3, torch.where(valid, listed, keys), valid.to(q.dtype))
        return attend(q, k, v, times[..., :keys] * seen, **how)
    return _rotated(q, k, v, torch.where(valid, listed, 0), valid, seen, rope_cos, rope_sin, **how)


def _rotated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    listed: Tensor,
    valid: Tensor,
    seen: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query by query: the listed keys, each rotated to its place."""
    (batch, heads, queries, dim), places = q.shape, listed.shape[3]
    out, lse = q.new_zeros(batch, heads, queries, v.shape[3]), q.new_zeros(batch, heads, queries)
    cos, sin = cos[:places], sin[:places]
    group = heads // max(k.shape[1], 1)
    mask = None if mask is None else mask.expand(batch, heads, queries, -1)
    for b in range(batch):
        for h in range(heads):
            bias = None if key_bias is None else key_bias[b % key_bias.shape[0]]
            for i in range(queries):
                row, source = listed[b, h, i], h // group
                first, second = k[b, source, row].split(dim // 2, -1)
                key = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
                times = (valid[b, h, i] & seen[b, h, i, row]).to(q.dtype)
                some_bias = None if bias is None else bias[source % len(bias), row][None, None]
                one = q[b, h, i][None, None, None], key[None, None], v[b, source, row][None, None]
                row_mask = None if mask is None else mask[b, h, i, row]
                result = attend(*one, times, some_bias, scale, softcap, row_mask)
                out[b, h, i], lse[b, h, i] = result[0][0, 0, 0], result[1][0, 0, 0]
    return out, lse


def qkv(draw: Draw, double: bool = True, wide: bool = False) -> dict[str, Tensor]:
    batch, (heads, keys_heads) = draw.batch(), draw.heads()
    queries, keys, dim = draw.queries(), draw.size(), draw.channels()
    if not draw.small and draw.chance(0.06):
        keys = draw.one_of(500, 1000, 1025)
    dim = draw.choice([257, 300, 512, 576]) if wide else dim
    value_dim = dim if draw.chance() else draw.channels()
    dtype, plain = draw.dtype(double), draw.chance()
    shapes = {
        "q": (batch, heads, queries, dim),
        "k": (batch, keys_heads, keys, dim),
        "v": (batch, keys_heads, keys, value_dim),
    }
    return {name: draw.floats(shape, dtype, plain) for name, shape in shapes.items()}


def bool_mask(draw: Draw, q: Tensor, keys: int) -> Tensor:
    batch, heads, queries, _ = q.shape
    shape = draw.choice([1, batch]), draw.choice([1, heads]), draw.choice([1, queries]), keys
    return draw.mask(shape)


def full_mask(draw: Draw, q: Tensor, keys: int) -> Tensor:
    seen = bool_mask(draw, q, keys)
    if draw.chance(0.6):
        return seen
    dtype = F64 if q.dtype == F64 else draw.choice([F32, q.dtype])
    return draw.floats(seen.shape, dtype, plain=True).where(seen, -torch.inf)


def bias(draw: Draw, q: Tensor, heads: int, keys: int) -> Tensor:
    shape = draw.choice([1, q.shape[0]]), draw.choice([1, heads]), keys
    bias = draw.floats(shape, F64 if q.dtype == F64 else F32, plain=True)
    if draw.chance(0.4):
        bias[..., :: draw.choice([1, 2, 3, 3])] = -torch.inf
    return bias


def _hiding(draw: Draw, some: dict[str, Any]) -> dict[str, Any]:
    """Options that hide keys, and a bias."""
    q, k = some["q"], some["k"]
    options: dict[str, Any] = {"causal": draw.chance(0.4), "scale": draw.scale()}
    if draw.chance(0.4):
        options["key_bias"] = bias(draw, q, k.shape[1], k.shape[2])
    if draw.chance(0.45):
        options["mask"] = full_mask(draw, q, k.shape[2])
    if draw.chance(0.2):
        options["softcap"] = draw.choice([0.5, 5.0, 50.0])
    return options


def biased_arguments(draw: Draw, wide: bool = False) -> dict[str, Any]:
    some: dict[str, Any] = qkv(draw, wide=wide)
    some |= _hiding(draw, some)
    if draw.chance(0.3):
        columns = draw.one_of(1, 2)
        for name, side in (("query_position", "q"), ("key_position", "k")):
            rows = draw.choice([1, some["q"].shape[0]])
            some[name] = draw.indices((rows, some[side].shape[2], columns), 20)
    return some


def lists_arguments(draw: Draw, wide: bool = False) -> dict[str, Any]:
    some: dict[str, Any] = qkv(draw, wide=wide)
    some |= _hiding(draw, some)
    batch, heads, queries, dim = some["q"].shape
    block = draw.choice([1, 1, 2, 3, 16, max(1, queries), queries + 5, 2**62])
    shared = draw.choice([1, some["k"].shape[1], heads])
    shape = batch, max(shared, 1) if heads else 1, -(-queries // block), draw.size()
    indices = draw.indices(shape, some["k"].shape[2])
    some["indices"] = indices.sort(-1).values if draw.chance(0.3) else indices
    some["block_q"] = block
    if dim % 2 == 0 and not wide and some["q"].dtype != F64 and draw.chance(0.2):
        if some["q"].numel() // dim * shape[3] > 3000:
            return some
        for name in ("rope_cos", "rope_sin"):
            some[name] = draw.floats((shape[3] + draw.one_of(0, 3), dim // 2), F32, plain=True)
    return some


def blocks_arguments(draw: Draw) -> dict[str, Any]:
    some: dict[str, Any] = qkv(draw)
    some |= _hiding(draw, some)
    batch, heads, queries, _ = some["q"].shape
    sizes = [draw.choice([1, 2, 3, 16, 17, 64, 128, 2**62]) for _ in range(2)]
    counts = [-(-n // size) for n, size in zip((queries, some["k"].shape[2]), sizes, strict=True)]
    some["block_mask"] = draw.mask((draw.choice([1, batch]), draw.choice([1, heads]), *counts))
    some["block_q"], some["block_k"] = sizes
    return some


def _attention(draw: Draw, op: str, some: dict[str, Any], plain: Any) -> Case:
    slack = 1e-13 if some["q"].dtype == F64 else 2e-6
    where = None
    if draw.chance(0.15):
        # Any key or value may hold NaN or infinities: queries that do not see it are not affected.
        clean = plain(**{name: _wide(v) for name, v in some.items()})
        for name in ("k", "v"):
            if draw.chance(0.7):
                some[name] = draw.spoiled(some[name], 0.02)
        spoiled = plain(**{name: _wide(v) for name, v in some.items()})
        equal = [(c == s) | (c.isnan() & s.isnan()) for c, s in zip(clean, spoiled, strict=True)]
        rows = equal[0].all(-1) & equal[1]
        where = (rows[..., None], rows)
    return Case(op, some, plain, slack, where, batched=BATCHED, loose=LOOSE, halves=True,
                refusable=not some["q"].shape[1])  # fmt: skip


def _wide(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value


@op_case
def biased_attention(draw: Draw) -> Case:
    return _attention(draw, "biased_attention", biased_arguments(draw, draw.chance(0.04)), biased)


@op_case
def sparse_attention(draw: Draw) -> Case:
    return _attention(draw, "sparse_attention", lists_arguments(draw, draw.chance(0.04)), lists)


@op_case
def block_sparse_attention(draw: Draw) -> Case:
    return _attention(draw, "block_sparse_attention", blocks_arguments(draw), blocks)


@op_case
def combine_states(draw: Draw) -> Case:
    batch, heads, queries = draw.batch(), draw.one_of(0, 1, 2, 3), draw.size()
    dim = draw.size((0, 1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 65, 100, 256, 300))
    dtype = draw.dtype(double=True)
    some: dict[str, Tensor] = {}
    for side in "ab":
        out = draw.floats((batch, heads, queries, dim), dtype)
        lse = draw.floats((batch, heads, queries), F64 if dtype == F64 else F32)
        if draw.chance(0.3):
            empty = torch.rand(lse.shape, generator=draw.generator()) < 0.4
            lse = lse.masked_fill(empty, -torch.inf)
            out = out.masked_fill(empty[..., None], torch.nan) if draw.chance() else out
        some[f"out_{side}"], some[f"lse_{side}"] = out, lse
    order = ("out_a", "lse_a", "out_b", "lse_b")
    some = {name: some[name] for name in order}
    return Case("combine_states", some, _union, batched=order, dense=("lse_a", "lse_b"))


def _union(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(lse_a, lse_b)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = [(lse - largest).exp() for lse in (lse_a, lse_b)]
    outs = [
        out.masked_fill(weight[..., None] == 0, 0) * weight[..., None]
        for out, weight in zip((out_a, out_b), weights, strict=True)
    ]
    total = weights[0] + weights[1]
    empty = total == 0
    out = (outs[0] + outs[1]) / total.masked_fill(empty, 1)[..., None]
    return out, (largest + total.masked_fill(empty, 1).log()).masked_fill(empty, -torch.inf)
