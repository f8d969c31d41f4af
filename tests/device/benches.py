"""What is timed on the device, beside torch: one table for each bench.

Every candidate is replayed as a CUDA graph with a cold L2; `small` sizes serve the rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from kernels import wgmma
from launches import draw
from torch import Tensor

import tokred
from bench.harness import CudaSampler, Timing, compare

BF16, F32 = torch.bfloat16, torch.float32
HEADS, KEY_HEADS, DIM = 32, 8, 128


@dataclass(frozen=True)
class Row:
    """Candidates on the same inputs; bytes are those that have to move, flops the multiply-adds."""

    name: str
    candidates: dict[str, Callable[[], Any]]
    bytes_moved: int = 0
    flops: int = 0


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def topk(device: str, small: bool) -> Iterator[Row]:
    shapes = [(2, 2000, 40), (8, 289, 64)] if small else [(8, 131072, 2048), (18432, 289, 64)]
    for rows, columns, k in shapes:
        x = draw((rows, columns), device)
        ours = {
            "tokred, by score": lambda x=x, k=k: tokred.topk(x, k),
            "tokred, by position": lambda x=x, k=k: tokred.topk(x, k, order="position"),
            "torch.topk": lambda x=x, k=k: torch.topk(x, k),
        }
        yield Row(f"[{rows}, {columns}], k = {k}", ours, _bytes(x) + 8 * rows * k)


def match(device: str, small: bool) -> Iterator[Row]:
    batch, tokens = (2, 90) if small else (64, 577)
    for dtype in (BF16, F32):
        x = draw((batch, tokens, 64), device, dtype)
        a, b = x[:, ::2].contiguous(), x[:, 1::2].contiguous()

        def in_torch(a: Tensor = a, b: Tensor = b) -> tuple[Tensor, Tensor]:
            return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT).max(-1)

        candidates = {
            "tokred.match": lambda a=a, b=b: tokred.match(a, b),
            "torch": in_torch,
            "tokred.bipartite_soft_matching": lambda x=x: tokred.bipartite_soft_matching(x, 16),
        }
        flops = 2 * batch * a.shape[1] * b.shape[1] * 64
        yield Row(f"[{batch}, {tokens}, 64] {dtype}", candidates, _bytes(x), flops)


def merge(device: str, small: bool) -> Iterator[Row]:
    batch, tokens, channels = (2, 90, 32) if small else (64, 577, 768)
    x = draw((batch, tokens, channels), device, BF16)
    token_map = tokred.bipartite_soft_matching(x[..., :32], tokens // 8)
    slots = tokens - tokens // 8
    index = token_map.long()[..., None].expand_as(x)

    def in_torch() -> Tensor:
        return x.new_zeros(batch, slots, channels).scatter_reduce(
            1, index, x, "mean", include_self=False
        )

    moved = _bytes(x) * (tokens + slots) // tokens
    candidates = {
        "tokred.merge": lambda: tokred.merge(x, token_map, slots),
        "torch scatter_reduce": in_torch,
    }
    yield Row(f"[{batch}, {tokens}, {channels}] bf16", candidates, moved)


def _cache(device: str, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q = draw((1, HEADS, 1, DIM), device, BF16)
    return q, *(draw((1, KEY_HEADS, keys, DIM), device, BF16) for _ in range(2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a group as queries of one head, which SDPA handles best."""
    packed = q.view(1, KEY_HEADS, HEADS // KEY_HEADS, DIM)
    return F.scaled_dot_product_attention(packed, k, v)


def _keys(small: bool) -> list[int]:
    return [200] if small else [8192, 131072]


def decode(device: str, small: bool) -> Iterator[Row]:
    for keys in _keys(small):
        q, k, v = _cache(device, keys)
        candidates = {
            "tokred.biased_attention": lambda q=q, k=k, v=v: tokred.biased_attention(q, k, v),
            "SDPA, group as queries": lambda q=q, k=k, v=v: _sdpa(q, k, v),
            "SDPA, enable_gqa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            ),
        }
        yield Row(f"{keys} keys, bf16", candidates, _bytes(k, v), 4 * HEADS * keys * DIM)


def sparse_decode(device: str, small: bool) -> Iterator[Row]:
    for keys in _keys(small):
        q, k, v = _cache(device, keys)
        chosen = min(2048, keys // 4)
        orders = [torch.randperm(keys)[:chosen].sort().values for _ in range(KEY_HEADS)]
        lists = torch.stack(orders)[None, :, None].to(device, torch.int32)
        wide = lists[:, :, 0, :, None].long().expand(-1, -1, -1, DIM)

        def gathered(q: Tensor = q, k: Tensor = k, v: Tensor = v, wide: Tensor = wide) -> Tensor:
            return _sdpa(q, k.gather(2, wide), v.gather(2, wide))

        candidates = {
            "tokred.sparse_attention": lambda q=q, k=k, v=v, i=lists: tokred.sparse_attention(
                q, k, v, i
            ),
            "torch gather, SDPA": gathered,
            "dense SDPA, group as queries": lambda q=q, k=k, v=v: _sdpa(q, k, v),
        }
        moved = 2 * chosen * KEY_HEADS * DIM * 2
        yield Row(f"{chosen} of {keys} keys, bf16", candidates, moved, 4 * HEADS * chosen * DIM)


def packed_decode(device: str, small: bool) -> Iterator[Row]:
    for keys in _keys(small):
        q, k, v = _cache(device, keys)
        candidates: dict[str, Callable[[], Any]] = {}
        for bits in (8, 4, 2):
            sides = [tokred.kv_pack(x, bits, 64) for x in (k, v)]
            candidates[f"tokred.packed_attention, {bits} bits"] = lambda q=q, s=sides: (
                tokred.packed_attention(q, *s)
            )
        candidates["dense SDPA, group as queries"] = lambda q=q, k=k, v=v: _sdpa(q, k, v)
        yield Row(f"{keys} keys", candidates, flops=4 * HEADS * keys * DIM)


def packed_qk_score(device: str, small: bool) -> Iterator[Row]:
    for keys in _keys(small):
        q, k, _ = _cache(device, keys)
        mean = q.view(1, KEY_HEADS, -1, DIM).float().mean(2).to(BF16)[..., None]
        candidates: dict[str, Callable[[], Any]] = {}
        for bits in (4, 2):
            packed = tokred.kv_pack(k, bits, 64)
            candidates[f"tokred.packed_qk_score, {bits} bits"] = lambda q=q, p=packed: (
                tokred.packed_qk_score(q, p, reduce="group_mean")
            )
        candidates["tokred.qk_score, bf16"] = lambda q=q, k=k: tokred.qk_score(
            q, k, reduce="group_mean"
        )
        candidates["torch, bf16"] = lambda k=k, mean=mean: (k @ mean)[..., 0]
        yield Row(f"{keys} keys", candidates, flops=2 * HEADS * keys * DIM)


def kv_pack(device: str, small: bool) -> Iterator[Row]:
    tokens = 64 if small else 32768
    x = draw((1, KEY_HEADS, tokens, DIM), device, BF16)
    for axis, bits, group in (("channel", 4, 64), ("token", 2, 32)):

        def in_torch(axis: str = axis, bits: int = bits, group: int = group) -> Tensor:
            rows = x.mT.contiguous() if axis == "token" else x
            groups = rows.float().unflatten(-1, (-1, group))
            low, high = groups.aminmax(dim=-1, keepdim=True)
            scale = (high - low) / (2**bits - 1)
            codes = ((groups - low) / scale).round().to(torch.uint8)
            codes = codes.view(*rows.shape[:-1], -1, 8 // bits)
            packed = codes[..., 0]
            for place in range(1, 8 // bits):
                packed = packed | codes[..., place] << bits * place
            return packed

        packed = tokred.kv_pack(x, bits, group, axis)
        candidates = {
            "tokred.kv_pack": lambda b=bits, g=group, a=axis: tokred.kv_pack(x, b, g, a),
            "torch": in_torch,
            "tokred.kv_unpack": lambda p=packed: tokred.kv_unpack(p, BF16),
        }
        yield Row(f"{bits} bits along {axis}s", candidates, _bytes(x) + packed.nbytes)


def prefill(device: str, small: bool) -> Iterator[Row]:
    for queries, dim in ((70, 64),) if small else ((4096, 64), (4096, 128), (16384, 128)):
        q, k, v = (draw((1, 16, queries, dim), device, BF16) for _ in range(3))

        def ours(on: bool, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            with wgmma(on):
                return tokred.biased_attention(q, k, v, causal=True)

        candidates = {
            "tokred.biased_attention": lambda f=ours: f(False),
            "tokred.biased_attention, wgmma": lambda f=ours: f(True),
            "SDPA": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        yield Row(f"{queries} queries and keys, D = {dim}, causal", candidates,
                  flops=2 * 16 * queries * queries * dim)  # fmt: skip


BENCHES = {
    bench.__name__: bench
    for bench in (
        topk, match, merge, decode, sparse_decode, packed_decode, packed_qk_score, kv_pack, prefill,
    )
}  # fmt: skip


def _once(call: Callable[[], Any]) -> Timing:
    """One call, for the rehearsal: no figure to be quoted."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Timing(seconds, seconds, seconds, 1, "once")


def measure(name: str, device: str, small: bool, budget_s: float) -> Iterator[dict[str, Any]]:
    """A line for every candidate of the bench; the rates are of what every candidate has to do."""
    with torch.no_grad():
        for row in BENCHES[name](device, small):
            if device == "cuda":
                timings = compare(row.candidates, budget_s, sampler=CudaSampler)
            else:
                timings = {name: _once(call) for name, call in row.candidates.items()}
            for candidate, timing in timings.items():
                seconds = timing.median_s
                yield {
                    "bench": name, "case": row.name, "candidate": candidate,
                    "us": round(seconds * 1e6, 2),
                    "p20": round(timing.p20_s * 1e6, 2), "p80": round(timing.p80_s * 1e6, 2),
                    "GB/s": round(row.bytes_moved / seconds / 1e9, 1) or None,
                    "TFLOP/s": round(row.flops / seconds / 1e12, 2) or None,
                    "samples": timing.samples, "timer": timing.timer,
                }  # fmt: skip
