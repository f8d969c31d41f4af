"""Attention with a bias per key beside torch's scaled_dot_product_attention.

biased: one f32 bias per key, as proportional attention needs; SDPA takes it as an additive mask,
broadcast or written out. SDPA without a mask does less work: a floor, not a peer. plain: no bias
on either side. backward: the gradients of q, k and v alone. causal_gqa: 32 query heads on 8.
unmerged: 729 positions of 192 tokens, as DyMU makes them of an image, rotated and causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred

from .harness import Case, agreement
from .machine import DTYPES, Run

TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
BACKWARD_TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads_q: int
    heads_kv: int
    tokens: int
    head_dim: int

    def dimensions(self) -> tuple[int, ...]:
        return self.batch, self.heads_q, self.heads_kv, self.tokens, self.head_dim

    def flops(self, causal: bool = False) -> int:
        whole = 4 * self.batch * self.heads_q * self.tokens**2 * self.head_dim
        return whole // 2 if causal else whole

    def bytes_moved(self, dtype: str) -> int:
        rows = 2 * self.batch * (self.heads_q + self.heads_kv) * self.tokens
        return rows * self.head_dim * DTYPES[dtype].itemsize


DINOV2 = Shape(1, 6, 6, 1370, 64)
VIT_B_384 = Shape(8, 12, 12, 577, 64)
DECODER = Shape(1, 32, 8, 2048, 128)


def query_key_value(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        x = torch.randn(shape.batch, count, shape.tokens, shape.head_dim, generator=generator)
        return x.to(device, DTYPES[dtype])

    return heads(shape.heads_q), heads(shape.heads_kv), heads(shape.heads_kv)


def log_sizes(shape: Shape, device: str) -> Tensor:
    """The logarithm of token sizes 1 to 4: f32 [B, 1, N]."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 5, (shape.batch, 1, shape.tokens), generator=generator)
    return sizes.float().log().to(device)


def masks(bias: Tensor, shape: Shape, dtype: str) -> tuple[Tensor, Tensor]:
    """The bias as SDPA's additive mask: broadcast [B, 1, 1, N] and written out [B, H, N, N]."""
    broadcast = bias[:, :, None, :].to(DTYPES[dtype])
    written_out = broadcast.expand(-1, shape.heads_q, shape.tokens, -1).contiguous()
    return broadcast, written_out


def biased_case(shape: Shape, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        q, k, v = query_key_value(shape, dtype, device)
        bias = log_sizes(shape, device)
        broadcast, written_out = masks(bias, shape, dtype)
        sdpa = partial(F.scaled_dot_product_attention, q, k, v)
        return {
            "tokred.biased_attention": partial(tokred.biased_attention, q, k, v, bias),
            "SDPA, mask [B,H,N,N]": partial(sdpa, attn_mask=written_out),
            "SDPA, mask [B,1,1,N]": partial(sdpa, attn_mask=broadcast),
            "SDPA, no mask": sdpa,
        }

    def examine(outputs: dict) -> dict:
        return agreement(TOLERANCE[dtype])(
            {n: o for n, o in outputs.items() if n != "SDPA, no mask"}
        )

    return Case(
        "sparse_attn",
        "biased",
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=shape.bytes_moved(dtype),
        flops=shape.flops(),
        ceiling=f"gemm_{dtype}",
        floors=("SDPA, no mask",),
        examine=examine,
    )


def plain_case(shape: Shape, dtype: str, device: str, causal: bool = False) -> Case:
    grouped = shape.heads_q != shape.heads_kv

    def build() -> dict[str, Callable]:
        q, k, v = query_key_value(shape, dtype, device)
        return {
            "tokred.biased_attention": partial(tokred.biased_attention, q, k, v, causal=causal),
            "SDPA": partial(
                F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=grouped
            ),
        }

    return Case(
        "sparse_attn",
        "causal_gqa" if causal else "plain",
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=shape.bytes_moved(dtype),
        flops=shape.flops(causal),
        ceiling=f"gemm_{dtype}",
        examine=agreement(TOLERANCE[dtype]),
    )


def backward_case(shape: Shape, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        inputs = tuple(x.requires_grad_() for x in query_key_value(shape, dtype, device))
        bias = log_sizes(shape, device)
        broadcast, written_out = masks(bias, shape, dtype)
        grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3))
        grad_out = grad_out.to(device, DTYPES[dtype])

        def backward_of(out: Tensor) -> Callable:
            return partial(torch.autograd.grad, out, inputs, grad_out, retain_graph=True)

        sdpa = partial(F.scaled_dot_product_attention, *inputs)
        return {
            "tokred.biased_attention": backward_of(tokred.biased_attention(*inputs, bias)[0]),
            "SDPA, mask [B,H,N,N]": backward_of(sdpa(attn_mask=written_out)),
            "SDPA, mask [B,1,1,N]": backward_of(sdpa(attn_mask=broadcast)),
            "SDPA, no mask": backward_of(sdpa()),
        }

    def examine(outputs: dict) -> dict:
        return agreement(BACKWARD_TOLERANCE[dtype])(
            {n: o for n, o in outputs.items() if n != "SDPA, no mask"}
        )

    return Case(
        "sparse_attn",
        "backward",
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=2 * shape.bytes_moved(dtype),
        flops=shape.flops() * 5 // 2,
        ceiling=f"gemm_{dtype}",
        floors=("SDPA, no mask",),
        examine=examine,
    )


@dataclass(frozen=True)
class Merged:
    """Positions of a decoder's visual tokens, most of which share one."""

    heads: int
    positions: int
    tokens: int
    head_dim: int


DYMU = Merged(28, 729, 192, 128)


def expanded(
    q: Tensor, k: Tensor, v: Tensor, token_map: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """index_select, rotation, SDPA, mean."""
    rows = token_map[0].long()

    def rotate(x: Tensor) -> Tensor:
        left, right = x.index_select(2, rows).chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    attended = F.scaled_dot_product_attention(
        rotate(q), rotate(k), v.index_select(2, rows), is_causal=True
    )
    count = torch.bincount(rows, minlength=q.shape[2]).clamp(min=1)[:, None]
    return torch.zeros_like(q).index_add(2, rows, attended) / count


def unmerged_case(shape: Merged, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        size = (1, shape.heads, shape.tokens, shape.head_dim)
        q, k, v = (
            torch.randn(size, generator=generator).to(device, DTYPES[dtype]) for _ in range(3)
        )
        token_map = torch.randint(0, shape.tokens, (1, shape.positions), generator=generator)
        inverse = 1e-6 ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(shape.positions)[None, :, None] * inverse
        inputs = (q, k, v, token_map.int().to(device))
        tables = (angles.cos().to(device), angles.sin().to(device))
        halves = [t.to(DTYPES[dtype]) for t in tables]
        return {
            "tokred.unmerged_attention": partial(tokred.unmerged_attention, *inputs, *tables),
            "expanded, SDPA": partial(expanded, *inputs, *halves),
        }

    pairs = shape.heads * shape.positions**2 // 2
    return Case(
        "sparse_attn",
        "unmerged",
        (shape.heads, shape.positions, shape.tokens, shape.head_dim),
        dtype,
        build,
        bytes_moved=4 * shape.heads * shape.tokens * shape.head_dim * DTYPES[dtype].itemsize,
        flops=2 * (pairs + shape.heads * shape.tokens**2) * shape.head_dim,
        ceiling="gemm_float32",
        examine=agreement(TOLERANCE[dtype]),
    )


def cases(run: Run) -> Iterator[Case]:
    for dtype in run.dtypes():
        yield biased_case(DINOV2, dtype, run.device)
    yield plain_case(DINOV2, "float32", run.device)
    yield backward_case(DINOV2, "float32", run.device)
    yield plain_case(DECODER, "float32", run.device, causal=True)
    for dtype in run.dtypes():
        yield unmerged_case(DYMU, dtype, run.device)
    if run.quick:
        return
    for dtype in run.dtypes():
        yield biased_case(VIT_B_384, dtype, run.device)
        if dtype != "float32":
            yield plain_case(DINOV2, dtype, run.device)
            yield backward_case(DINOV2, dtype, run.device)
            yield plain_case(DECODER, dtype, run.device, causal=True)
