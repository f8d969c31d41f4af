"""Scores of tokens beside their torch formulations.

columns: attention received by every key. similarity: mean cosine to all other tokens. pool: mean
keys of pages of 16.
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
    return Case("score", "columns", (batch, heads, count, dim), dtype, build,
                bytes_moved=bytes_moved, flops=flops, ceiling=f"gemm_{dtype}",
                examine=agreement(2e-3))


def similarity_case(shape: tuple[int, int, int], device: str) -> Case:
    batch, count, channels = shape

    def build() -> dict[str, Callable]:
        x = tokens(shape, "float32", device, "correlated")

        def written_out() -> tuple[Tensor, ...]:
            unit = functional.normalize(x, dim=-1)
            similarity = unit @ unit.transpose(-1, -2)
            variance, mean = torch.var_mean(similarity, -1, correction=0)
            similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            greatest, index = similarity.max(-1)
            return mean, variance, greatest, index, (similarity > 0.9).sum(-1)

        def ours() -> tuple[Tensor, ...]:
            stats = tokred.similarity_stats(x, threshold=0.9)
            return stats.mean, stats.variance, stats.greatest, stats.index, stats.count

        return {"tokred.similarity_stats": ours, "torch": written_out}

    return Case("score", "similarity", shape, "float32", build, "correlated",
                4 * batch * count * (channels + 5), 2 * batch * count**2 * channels,
                ceiling="gemm_float32", examine=agreement(1e-4))


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
    return Case("score", "pool", (1, heads, keys, dim), dtype, build, bytes_moved=bytes_moved,
                ceiling="read", examine=examine)


def cases(run: Run) -> Iterator[Case]:
    yield columns_case(1, 8, 4096, 64, "float32", run.device)
    yield similarity_case((8, 1024, 64), run.device)
    yield pool_case(8, 32768, 128, "bfloat16", run.device)
    if run.quick:
        return
    yield columns_case(8, 12, 577, 64, "float32", run.device)
    yield columns_case(1, 32, 4096, 128, "float32", run.device)
    yield similarity_case((64, 197, 64), run.device)
