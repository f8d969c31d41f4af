"""Linear attention with decay beside its chunked formulation in torch.

chunks: peers take all chunks of 64 at once, or go chunk by chunk as the
published kernels do. step: one token of decoding. backward: the gradients of q, k and v.
length: the same work at 16 times the tokens, whose time is that many times longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tokred

from .harness import Case, agreement
from .machine import DTYPES, Run

CHUNK = 64
TOLERANCE = {"float32": 1e-2, "float16": 1.0, "bfloat16": 8.0}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    tokens: int
    head_dim: int

    def dimensions(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.tokens, self.head_dim

    def flops(self) -> int:
        """Flops with chunks of 32, whose products are causal."""
        per_token = 24 * 2 * self.head_dim + 2 * self.head_dim**2
        return 2 * self.batch * self.heads * self.tokens * per_token

    def bytes_moved(self, dtype: str) -> int:
        rows = 4 * self.batch * self.heads * self.tokens * self.head_dim * DTYPES[dtype].itemsize
        return rows + 8 * self.batch * self.heads * self.head_dim**2


def inputs_of(shape: Shape, dtype: str, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(shape.dimensions(), generator=generator) for _ in range(3)]
    q, k, v = (t.to(device, DTYPES[dtype]) for t in rows)
    heads = torch.arange(1, shape.heads + 1)
    return q, k, v, (2.0 ** (-8 * heads / shape.heads)).to(device)


@dataclass(frozen=True)
class Weights:
    """What decay does within a chunk, into it and out of it."""

    within: Tensor
    earlier: Tensor
    later: Tensor
    whole: Tensor

    @classmethod
    def of(cls, decay: Tensor, dtype: torch.dtype) -> Weights:
        i = torch.arange(CHUNK, device=decay.device)
        rate = decay[:, None, None]
        return cls(
            (-rate * (i[:, None] - i)).exp().tril().to(dtype),
            (-rate * (i[:, None] + 1)).exp().to(dtype),
            (-rate * (CHUNK - 1 - i[:, None])).exp().to(dtype),
            (-rate * CHUNK).exp(),
        )


def in_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks in one batched product; only their states follow each other."""
    w = Weights.of(decay, q.dtype)
    q, k, v = (t.unflatten(2, (-1, CHUNK)) for t in (q, k, v))
    within = (q @ k.mT * w.within[:, None]) @ v
    added = (k * w.later[:, None]).mT @ v
    state, states = torch.zeros_like(added[:, :, 0], dtype=torch.float32), []
    for i in range(added.shape[2]):
        states.append(state)
        state = w.whole * state + added[:, :, i]
    before = torch.stack(states, 2).to(q.dtype)
    return (within + (q * w.earlier[:, None]) @ before).flatten(2, 3), state


def one_by_one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk by chunk."""
    w = Weights.of(decay, q.dtype)
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], device=q.device)
    outs = []
    for a, b, c in zip(*(t.split(CHUNK, 2) for t in (q, k, v)), strict=True):
        outs.append((a @ b.mT * w.within) @ c + (a * w.earlier) @ state.to(a.dtype))
        state = w.whole * state + (b * w.later).mT @ c
    return torch.cat(outs, 2), state


def step(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = factor * state + k.mT.float() * v.float()
    return (q.float() @ state).to(q.dtype), state


def chunks_case(shape: Shape, dtype: str, device: str, name: str = "chunks") -> Case:
    def build() -> dict[str, Callable]:
        inputs = inputs_of(shape, dtype, device)
        return {
            "tokred.linear_attention": partial(tokred.linear_attention, *inputs),
            "torch, in chunks": partial(in_chunks, *inputs),
            "torch, chunk by chunk": partial(one_by_one, *inputs),
        }

    return Case(
        "linear_attn",
        name,
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=shape.bytes_moved(dtype),
        flops=shape.flops(),
        ceiling="gemm_float32",
        examine=agreement(TOLERANCE[dtype]),
    )


def step_case(shape: Shape, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        q, k, v, decay = inputs_of(shape, dtype, device)
        factor = (-decay).exp()[:, None, None]
        state = torch.randn(*shape.dimensions()[:2], *(shape.head_dim,) * 2, device=device)
        return {
            "tokred.linear_attention": partial(tokred.linear_attention, q, k, v, decay, state),
            "torch": partial(step, q, k, v, factor, state),
        }

    return Case(
        "linear_attn",
        "step",
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=shape.bytes_moved(dtype),
        ceiling="copy",
        examine=agreement(TOLERANCE[dtype]),
    )


def backward_case(shape: Shape, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        *rows, decay = inputs_of(shape, dtype, device)
        leaves = [t.requires_grad_() for t in rows]
        grad_out = torch.randn(shape.dimensions(), generator=torch.Generator().manual_seed(1))
        grad_out = grad_out.to(device, DTYPES[dtype])

        def backward_of(function: Callable) -> Callable:
            out, _ = function(*leaves, decay)
            return partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)

        return {
            "tokred.linear_attention": backward_of(tokred.linear_attention),
            "torch, in chunks": backward_of(in_chunks),
            "torch, chunk by chunk": backward_of(one_by_one),
        }

    return Case(
        "linear_attn",
        "backward",
        shape.dimensions(),
        dtype,
        build,
        bytes_moved=2 * shape.bytes_moved(dtype),
        flops=3 * shape.flops(),
        ceiling="gemm_float32",
        examine=agreement(10 * TOLERANCE[dtype]),
    )


def cases(run: Run) -> Iterator[Case]:
    for dtype in run.dtypes():
        yield chunks_case(Shape(1, 8, 4096, 64), dtype, run.device)
    yield chunks_case(Shape(1, 32, 1024, 128), "float32", run.device)
    yield backward_case(Shape(1, 8, 2048, 64), "float32", run.device)
    yield step_case(Shape(4, 32, 1, 128), "float32", run.device)
    if run.quick:
        return
    for tokens in (1 << 14, 1 << 18):
        yield chunks_case(Shape(1, 2, tokens, 64), "float32", run.device, "length")
    for dtype in run.dtypes():
        if dtype != "float32":
            yield chunks_case(Shape(1, 32, 1024, 128), dtype, run.device)
            yield step_case(Shape(4, 32, 1, 128), dtype, run.device)
