"""Low-bit keys and values: packing, decode attention on packed caches, and the sparse packed step.

pack, unpack: [1, 8, 32768, 128], beside the torch formulation and ggml's q4_0 and q8_0 (which keep
a scale every 32 numbers, work on one thread, and write to a buffer that is there). decode:
32 query heads on 8 key heads, D = 128, beside SDPA on the bf16 keys and values that were packed,
ONNX Runtime's GroupQueryAttention (one scale a tensor) and ggml's attention in its best layout; and
beside our own dense attention. step: score the packed keys, choose 2048, attend to them; in records
of 144 bytes, and apart. append: one token, beside a copy into a bf16 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred import PackedKV

from .bench_decode import CHOSEN, DIM, HEADS_KV, HEADS_Q, Cache
from .harness import Case, agreement
from .machine import DTYPES, Run
from .peers import ggml

PACKED_TOKENS = 32768
DENSE = "SDPA on bf16, group packed as queries"


def pack_in_torch(x: Tensor, bits: int, group_size: int, axis: str) -> tuple[Tensor, ...]:
    """KIVI's formula; bytes of neighbouring codes."""
    if axis == "token":
        x = x.transpose(2, 3)
    groups = x.float().unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = ((groups - low) / scale).clamp(0, 2**bits - 1).round().to(torch.uint8)
    codes = codes.view(*x.shape[:-1], -1, 8 // bits)
    packed = codes[..., 0]
    for place in range(1, 8 // bits):
        packed = packed | codes[..., place] << bits * place
    return packed, scale, low


def unpack_in_torch(
    packed: Tensor, scale: Tensor, low: Tensor, bits: int, out: Tensor | None = None
) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> shifts & 2**bits - 1).flatten(-2)
    groups = codes.unflatten(-1, (scale.shape[-2], -1)).float()
    if out is not None:
        return torch.mul(groups, scale, out=out.view(groups.shape)).add_(low)
    return (groups * scale + low).flatten(-2)


def has_ggml(bits: int, axis: str, device: str) -> bool:
    return device == "cpu" and bits in ggml.TYPES and axis == "channel" and ggml.is_here()


def has_onnx() -> bool:
    return all(find_spec(package) for package in ("onnx", "onnxruntime"))


def packed_bytes(heads: int, tokens: int, bits: int, group_size: int) -> int:
    form = tokred.PackFormat(bits, group_size)
    return int(heads * tokens * form.token_bytes(DIM))


def pack_case(bits: int, group_size: int, axis: str, dtype: str, device: str) -> Case:
    shape = (1, HEADS_KV, PACKED_TOKENS, DIM)

    def build() -> dict[str, Callable]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x.to(device, DTYPES[dtype])
        candidates = {
            "tokred.kv_pack": partial(tokred.kv_pack, x, bits, group_size, axis),
            "torch": partial(pack_in_torch, x, bits, group_size, axis),
        }
        if dtype == "float32" and has_ggml(bits, axis, device):
            candidates[f"ggml q{bits}_0, 1 thread"] = ggml.Rows(x, bits).pack
        return candidates

    numbers = HEADS_KV * PACKED_TOKENS * DIM
    moved = numbers * DTYPES[dtype].itemsize + packed_bytes(8, PACKED_TOKENS, bits, group_size)
    return Case(
        "packed",
        f"pack, {bits} bits, {group_size} along {axis}s",
        shape,
        dtype,
        build,
        bytes_moved=moved,
        ceiling="copy",
    )


def unpack_case(bits: int, group_size: int, axis: str, into: bool, device: str) -> Case:
    """To a fresh tensor, whose pages the system clears first, or into one that is there."""
    shape = (1, HEADS_KV, PACKED_TOKENS, DIM)

    def build() -> dict[str, Callable]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        packed = tokred.kv_pack(x, bits, group_size, axis)
        theirs = pack_in_torch(x, bits, group_size, axis)
        out = torch.empty_like(x) if into else None
        candidates = {
            "tokred.kv_unpack": partial(tokred.kv_unpack, packed, out=out),
            "torch": partial(unpack_in_torch, *theirs, bits, out),
        }
        if into and has_ggml(bits, axis, device):
            rows = ggml.Rows(x, bits)
            rows.pack()
            candidates[f"ggml q{bits}_0, 1 thread"] = rows.unpack
        return candidates

    moved = 4 * HEADS_KV * PACKED_TOKENS * DIM + packed_bytes(8, PACKED_TOKENS, bits, group_size)
    name = f"unpack{' into a buffer' * into}, {bits} bits, {group_size} along {axis}s"
    return Case("packed", name, shape, "float32", build, bytes_moved=moved, ceiling="copy")


def packed_sides(cache: Cache, bits: int, axis: str = "channel") -> tuple[PackedKV, PackedKV]:
    """Keys along `axis`, values along channels, in groups of 64."""
    return tokred.kv_pack(cache.k, bits, 64, axis), tokred.kv_pack(cache.v, bits, 64)


def decode_case(keys: int, bits: int, axis: str, run: Run) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, "bfloat16", run.device)
        k, v = packed_sides(cache, bits, axis)
        candidates: dict[str, Callable] = {
            f"tokred.packed_attention, {bits} bits": partial(
                tokred.packed_attention, cache.q, k, v
            ),
            DENSE: cache.sdpa_packed,
        }
        q = cache.q[0, :, 0].float()
        if run.device == "cpu" and bits in (4, 8) and axis == "channel" and has_onnx():
            from .peers import onnx

            candidates["ONNX Runtime GQA, same bits"] = onnx.Attention(
                q, HEADS_KV, keys, bits, run.threads
            )
        if has_ggml(bits, axis, run.device):
            candidates[f"ggml attention, q{bits}_0"] = ggml.Attention(
                q, cache.k[0], cache.v[0], bits, run.threads
            )
        return candidates

    return Case(
        "packed",
        f"decode, {bits} bits, K along {axis}s",
        (1, HEADS_Q, HEADS_KV, keys, DIM),
        "bfloat16",
        build,
        bytes_moved=2 * packed_bytes(HEADS_KV, keys, bits, 64),
        flops=4 * HEADS_Q * keys * DIM,
        ceiling="read",
    )


def latent_case(tokens: int, bits: int, device: str) -> Case:
    """DeepSeek-V2-Lite's decode: 16 heads, latents of 512 and 64 rotary channels, absorbed weights;
    beside the same in torch, and SDPA on the heads of 192 and 128 that latents expand to.
    bits 16: latents in bfloat16, as they are.
    """
    heads, rank, rotary, scale = 16, 512, 64, 192**-0.5
    token_bytes = 2 * (rank + rotary)
    if bits < 16:
        token_bytes = tokred.PackFormat(bits, 64).token_bytes(rank + rotary)

    def build() -> dict[str, Callable]:
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(device, torch.bfloat16)

        q, rows = draw(1, heads, 1, rank + rotary), draw(1, 1, tokens, rank + rotary)
        if bits < 16:
            packed = tokred.kv_pack(rows, bits, 64)
            ours = partial(tokred.packed_attention, q, packed, packed, scale=scale)
        else:
            ours = partial(tokred.biased_attention, q, rows, rows[..., :rank], scale=scale)

        def absorbed() -> Tensor:
            weights = (q[0, :, 0] * scale @ rows[0, 0].mT).softmax(-1)
            return weights @ rows[0, 0, :, :rank]

        candidates: dict[str, Callable] = {
            f"tokred.{'packed' if bits < 16 else 'biased'}_attention, {bits} bits": ours,
            "torch on bf16 latents": absorbed,
        }
        expanded = draw(1, heads, 1, 192), draw(1, heads, tokens, 192), draw(1, heads, tokens, 128)
        candidates["SDPA on bf16 heads"] = partial(F.scaled_dot_product_attention, *expanded)
        return candidates

    return Case(
        "packed",
        f"decode of latents, {bits} bits",
        (1, heads, 1, tokens, rank + rotary),
        "bfloat16",
        build,
        bytes_moved=int(tokens * token_bytes),
        flops=2 * heads * tokens * (2 * rank + rotary),
        ceiling="read",
    )


def beside_dense_case(keys: int, device: str) -> Case:
    """All widths beside our own attention on the keys and values that were packed."""

    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, "bfloat16", device)
        candidates = {
            f"tokred.packed_attention, {bits} bits": partial(
                tokred.packed_attention, cache.q, *packed_sides(cache, bits)
            )
            for bits in (8, 4, 2)
        }
        return candidates | {
            "tokred.biased_attention, bf16": partial(
                tokred.biased_attention, cache.q, cache.k, cache.v
            ),
            DENSE: cache.sdpa_packed,
        }

    return Case(
        "packed", "decode beside bf16", (1, HEADS_Q, HEADS_KV, keys, DIM), "bfloat16", build
    )


def codebook_case(keys: int, bits: int, device: str) -> Case:
    """TurboQuant's codes: a scale for a whole row."""

    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, "bfloat16", device)
        sides = [
            tokred.kv_pack(x, bits, DIM, scheme="codebook", rotate=True) for x in (cache.k, cache.v)
        ]
        return {
            f"tokred.packed_attention, {bits} bits": partial(
                tokred.packed_attention, cache.q, *sides
            ),
            DENSE: cache.sdpa_packed,
        }

    return Case(
        "packed",
        f"decode, codebook of {bits} bits",
        (1, HEADS_Q, HEADS_KV, keys, DIM),
        "bfloat16",
        build,
        bytes_moved=2 * HEADS_KV * keys * (DIM * bits // 8 + 2),
        flops=4 * HEADS_Q * keys * DIM,
        ceiling="read",
    )


def unpack_first_case(keys: int, device: str) -> Case:
    """What a cache that unpacks does: all of it to bf16, then SDPA."""

    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, "bfloat16", device)
        k, v = packed_sides(cache, 4)
        sides = [pack_in_torch(x, 4, 64, "channel") for x in (cache.k, cache.v)]
        group = cache.q.view(1, HEADS_KV, -1, DIM)

        def unpack_then_attend() -> Tensor:
            whole = [unpack_in_torch(*side, 4).to(torch.bfloat16) for side in sides]
            return F.scaled_dot_product_attention(group, *whole).view_as(cache.q)

        return {
            "tokred.packed_attention, 4 bits": partial(tokred.packed_attention, cache.q, k, v),
            "torch unpack, SDPA": unpack_then_attend,
            DENSE: cache.sdpa_packed,
        }

    def examine(outputs: dict) -> dict:
        return agreement(1e-2)({name: out for name, out in outputs.items() if name != DENSE})

    return Case(
        "packed",
        "decode beside unpacking",
        (1, HEADS_Q, HEADS_KV, keys, DIM),
        "bfloat16",
        build,
        bytes_moved=2 * packed_bytes(HEADS_KV, keys, 4, 64),
        ceiling="read",
        examine=examine,
    )


def records(k: PackedKV, v: PackedKV) -> tuple[PackedKV, PackedKV]:
    """The same codes and params, those of a token side by side."""
    layout = tokred.Records(k.format, v.format, k.head_dim, v.head_dim)
    key, value = layout.empty(*k.codes.shape[:3], k.codes.device)
    for side, place in ((k, key), (v, value)):
        place.codes.copy_(side.codes)
        place.params.copy_(side.params)
    return key, value


def step_case(keys: int, device: str) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, "bfloat16", device)

        def step(k: PackedKV, v: PackedKV) -> tuple[Tensor, Tensor]:
            scores = tokred.packed_qk_score(cache.q, k, reduce="group_mean")
            indices = tokred.topk(scores, CHOSEN, order="position")[1]
            return tokred.packed_attention(cache.q, k, v, indices=indices[:, :, None])

        candidates = {}
        for bits in (4, 2):
            sides = packed_sides(cache, bits)
            candidates[f"tokred step, {bits} bits, records"] = partial(step, *records(*sides))
            if bits == 4:
                candidates["tokred step, 4 bits, apart"] = partial(step, *sides)
        return candidates | {
            "tokred.biased_attention, bf16": partial(
                tokred.biased_attention, cache.q, cache.k, cache.v
            ),
            DENSE: cache.sdpa_packed,
        }

    return Case("packed", "step", (1, HEADS_Q, HEADS_KV, keys, DIM, CHOSEN), "bfloat16", build)


def append_case(keys: int, axis: str, device: str) -> Case:
    """One token into a long cache, with a window of 128."""

    def build() -> dict[str, Callable]:
        form = tokred.PackFormat(4, 64, axis)
        cache = form.empty(1, HEADS_KV, keys, DIM, device)
        window = torch.zeros(1, HEADS_KV, 128, DIM, dtype=torch.bfloat16, device=device)
        token = torch.randn(1, HEADS_KV, 1, DIM).to(device, torch.bfloat16)
        dense = torch.zeros(1, HEADS_KV, keys, DIM, dtype=torch.bfloat16, device=device)
        place = dense[:, :, keys // 2 : keys // 2 + 1]
        return {
            "tokred.kv_append": partial(tokred.kv_append, token, cache, keys // 2, window),
            "torch copy into a bf16 cache": partial(place.copy_, token),
        }

    return Case(
        "packed", f"append, 4 bits along {axis}s", (1, HEADS_KV, keys, DIM), "bfloat16", build
    )


def cases(run: Run) -> Iterator[Case]:
    yield pack_case(4, 64, "channel", "float32", run.device)
    yield pack_case(4, 64, "token", "float32", run.device)
    yield pack_case(2, 32, "channel", "float32", run.device)
    yield pack_case(2, 32, "token", "float32", run.device)
    for into in (False, True):
        yield unpack_case(4, 64, "channel", into, run.device)
        yield unpack_case(2, 32, "token", into, run.device)
    longest = 131072
    for bits in (8, 4, 2):
        yield decode_case(longest, bits, "channel", run)
    yield decode_case(longest, 4, "token", run)
    for bits in (16, 8, 4):
        yield latent_case(32768, bits, run.device)
    yield codebook_case(longest, 3, run.device)
    yield beside_dense_case(longest, run.device)
    yield unpack_first_case(8192, run.device)
    yield step_case(longest, run.device)
    yield append_case(longest, "channel", run.device)
    if run.quick:
        return
    for bits in (8, 3, 1):
        yield pack_case(bits, 64, "channel", "float32", run.device)
        yield unpack_case(bits, 64, "channel", True, run.device)
    for dtype in ("float16", "bfloat16"):
        yield pack_case(4, 64, "channel", dtype, run.device)
        yield pack_case(4, 64, "token", dtype, run.device)
    for keys in (8192, 32768):
        for bits in (8, 4, 2):
            yield decode_case(keys, bits, "channel", run)
        yield step_case(keys, run.device)
