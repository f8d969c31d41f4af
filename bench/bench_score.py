"""Scores of tokens beside their torch formulations.

columns: attention received by every key. similarity: mean cosine to all other tokens. pool: mean
keys of pages of 16. rows: the attention of the last 32 queries. pagerank: three steps along the
attention graph, beside a stored N x N matrix. transition: what a layer does to its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from .harness import Case, agreement, tokens
from .machine import DTYPES, Run


def columns_case(batch: int, heads: int, count: int, dim: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, batch, heads, count, dim, generator=generator)
        q, k = (x.to(device, DTYPES[dtype]) for x in (q, k))
        _, lse = tokred.biased_attention(q, k, k[..., :1])

        def written_out() -> Tensor:
            return (dim**-0.5 * q @ k.transpose(-1, -2)).softmax(-1).sum(-2)

        return {
            "tokred.attention_columns, lse=": partial(tokred.attention_columns, q, k, lse),
            "tokred.attention_columns": partial(tokred.attention_columns, q, k),
            "torch softmax, sum": written_out,
        }

    flops = 2 * batch * heads * count**2 * dim
    bytes_moved = batch * heads * count * (2 * dim * DTYPES[dtype].itemsize + 4)
    return Case(
        "score",
        "columns",
        (batch, heads, count, dim),
        dtype,
        build,
        bytes_moved=bytes_moved,
        flops=flops,
        ceiling=f"gemm_{dtype}",
        examine=agreement(2e-3),
    )


def similarity_case(shape: tuple[int, int, int], device: str) -> Case:
    batch, count, channels = shape

    def build() -> dict[str, Callable]:
        x = tokens(shape, "float32", device, "correlated")

        def written_out() -> tuple[Tensor, ...]:
            unit = functional.normalize(x, dim=-1)
            similarity = unit @ unit.transpose(-1, -2)
            variance, mean = torch.var_mean(similarity, -1, correction=0)
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            largest, index = similarity.max(-1)
            return mean, variance, largest, index, (similarity > 0.9).sum(-1)

        def ours() -> tuple[Tensor, ...]:
            stats = tokred.similarity_stats(x, threshold=0.9)
            return stats.mean, stats.variance, stats.largest, stats.index, stats.count

        return {"tokred.similarity_stats": ours, "torch": written_out}

    return Case(
        "score",
        "similarity",
        shape,
        "float32",
        build,
        "correlated",
        4 * batch * count * (channels + 5),
        2 * batch * count**2 * channels,
        ceiling="gemm_float32",
        examine=agreement(1e-4),
    )


def pool_case(heads: int, keys: int, dim: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        k = torch.randn(1, heads, keys, dim, generator=torch.Generator().manual_seed(0))
        k = k.to(device, DTYPES[dtype])
        return {
            "tokred.block_pool": partial(tokred.block_pool, k, 16),
            "torch mean": lambda: k.unflatten(2, (-1, 16)).float().mean(3),
        }

    def examine(outputs: dict) -> dict:
        pooled = outputs["tokred.block_pool"][0][:, :, :, 0]
        return agreement(1e-4)({"ours": pooled, "torch": outputs["torch mean"]})

    bytes_moved = heads * keys * dim * DTYPES[dtype].itemsize + heads * keys // 16 * dim * 4
    return Case(
        "score",
        "pool",
        (1, heads, keys, dim),
        dtype,
        build,
        bytes_moved=bytes_moved,
        ceiling="read",
        examine=examine,
    )


def rows_case(heads: int, keys: int, dim: int, device: str) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, heads, 32, dim, generator=generator).to(device)
        k = torch.randn(1, heads, keys, dim, generator=generator).to(device)
        return {
            "tokred.attention_rows": partial(tokred.attention_rows, q, k),
            "torch softmax": lambda: (dim**-0.5 * q @ k.transpose(-1, -2)).softmax(-1),
        }

    return Case(
        "score",
        "rows",
        (1, heads, 32, keys, dim),
        "float32",
        build,
        bytes_moved=4 * heads * keys * (dim + 32),
        flops=2 * heads * 32 * keys * dim,
        ceiling="gemm_float32",
        examine=agreement(1e-4),
    )


def pagerank_case(heads: int, count: int, dim: int, device: str) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        q, k = torch.randn(2, 1, heads, count, dim, generator=generator).to(device)
        _, lse = tokred.biased_attention(q, k, k[..., :1])

        def stored() -> Tensor:
            attention = (dim**-0.5 * q @ k.transpose(-1, -2)).softmax(-1)
            rank = torch.full((1, heads, 1, count), 1 / count, device=device)
            for _ in range(3):
                rank = rank @ attention
            return rank[:, :, 0]

        ours = partial(tokred.pagerank, q, k, 3, lse=lse)
        return {"tokred.pagerank": ours, "torch, N x N stored": stored}

    return Case(
        "score",
        "pagerank",
        (1, heads, count, dim),
        "float32",
        build,
        bytes_moved=8 * heads * count * dim,
        flops=6 * heads * count**2 * dim,
        ceiling="gemm_float32",
        examine=agreement(1e-5),
    )


def transition_case(shape: tuple[int, int, int], device: str) -> Case:
    def build() -> dict[str, Callable]:
        before = tokens(shape, "float32", device)
        after = before + 0.1 * tokens(shape, "float32", device, seed=1)

        def written_out() -> tuple[Tensor, Tensor]:
            ratio = after.norm(dim=-1) / before.norm(dim=-1)
            return ratio, functional.cosine_similarity(before, after, dim=-1)

        ours = partial(tokred.transition_stats, before, after)
        return {"tokred.transition_stats": ours, "torch": written_out}

    batch, count, channels = shape
    return Case(
        "score",
        "transition",
        shape,
        "float32",
        build,
        bytes_moved=4 * batch * count * (2 * channels + 2),
        ceiling="read",
        examine=agreement(1e-5),
    )


def cases(run: Run) -> Iterator[Case]:
    yield columns_case(1, 8, 4096, 64, "float32", run.device)
    yield similarity_case((8, 1024, 64), run.device)
    yield pool_case(8, 32768, 128, "bfloat16", run.device)
    yield rows_case(8, 8192, 128, run.device)
    yield pagerank_case(8, 2048, 64, run.device)
    yield transition_case((64, 577, 768), run.device)
    if run.quick:
        return
    yield columns_case(8, 12, 577, 64, "float32", run.device)
    yield columns_case(1, 32, 4096, 128, "float32", run.device)
    yield similarity_case((64, 197, 64), run.device)
