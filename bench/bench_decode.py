"""One decoded token against a long cache: dense, over chosen keys, and the whole sparse step.

32 query heads on 8 key heads, D = 128. dense: every key. sparse: 2048 given keys a key head. score:
the logits alone, meaned over each group. step: score, choose 2048, attend; by token, by the means
of pages of 64 kept beside the cache, and by 24 dimensions (FASA), where they lie and in rows of
their own (as in FASA-M), beside dense attention. combine: two states of 32 heads and 2048 queries
merged. tree: 64 draft tokens of a tree behind the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred
from tokred.methods.fasa import DominantKeys, fasa_attention
from tokred.selection import expand_blocks

from .harness import Case, agreement
from .machine import DTYPES, Run

HEADS_Q, HEADS_KV, DIM, CHOSEN, PAGE = 32, 8, 128, 2048, 64
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Cache:
    q: Tensor  # [1, 32, 1, 128]
    k: Tensor  # [1, 8, N, 128]
    v: Tensor

    @classmethod
    def make(cls, keys: int, dtype: str, device: str) -> Cache:
        generator = torch.Generator().manual_seed(0)

        def heads(count: int, length: int) -> Tensor:
            x = torch.randn(1, count, length, DIM, generator=generator)
            return x.to(device, DTYPES[dtype])

        return cls(heads(HEADS_Q, 1), heads(HEADS_KV, keys), heads(HEADS_KV, keys))

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, enable_gqa=True)

    def sdpa_packed(self) -> Tensor:
        """The heads of a group as queries of one head, which SDPA handles far better."""
        packed = self.q.view(1, HEADS_KV, HEADS_Q // HEADS_KV, DIM)
        return F.scaled_dot_product_attention(packed, self.k, self.v).view_as(self.q)


def row_bytes(dtype: str) -> int:
    return 2 * HEADS_KV * DIM * DTYPES[dtype].itemsize


def dense_case(keys: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, dtype, device)
        return {
            "tokred.biased_attention": partial(tokred.biased_attention, cache.q, cache.k, cache.v),
            "SDPA, enable_gqa": cache.sdpa,
            "SDPA, group packed as queries": cache.sdpa_packed,
        }

    return Case(
        "decode",
        "dense",
        (1, HEADS_Q, HEADS_KV, keys, DIM),
        dtype,
        build,
        bytes_moved=keys * row_bytes(dtype),
        flops=4 * HEADS_Q * keys * DIM,
        ceiling="read",
        examine=agreement(TOLERANCE[dtype]),
    )


def random_lists(keys: int, device: str) -> Tensor:
    """i32 [1, 8, 1, 2048], sorted."""
    generator = torch.Generator().manual_seed(1)
    lists = [torch.randperm(keys, generator=generator)[:CHOSEN].sort().values
             for _ in range(HEADS_KV)]  # fmt: skip
    return torch.stack(lists).to(torch.int32)[None, :, None].to(device)


def sparse_case(keys: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, dtype, device)
        indices = random_lists(keys, device)
        wide = indices.long()

        def by_head() -> Tensor:
            """An index_select a head, then SDPA with the group packed as queries."""
            chosen = [
                torch.stack([x[0, h].index_select(0, wide[0, h, 0]) for h in range(HEADS_KV)])[None]
                for x in (cache.k, cache.v)
            ]
            packed = cache.q.view(1, HEADS_KV, HEADS_Q // HEADS_KV, DIM)
            return F.scaled_dot_product_attention(packed, *chosen).view_as(cache.q)

        def gathered() -> Tensor:
            index = wide[:, :, 0, :, None].expand(-1, -1, -1, DIM)
            chosen = [x.gather(2, index) for x in (cache.k, cache.v)]
            packed = cache.q.view(1, HEADS_KV, HEADS_Q // HEADS_KV, DIM)
            return F.scaled_dot_product_attention(packed, *chosen).view_as(cache.q)

        ours = partial(tokred.sparse_attention, cache.q, cache.k, cache.v, indices)
        return {"tokred.sparse_attention": ours, "index_select, SDPA": by_head,
                "gather, SDPA": gathered}  # fmt: skip

    return Case(
        "decode",
        "sparse",
        (1, HEADS_Q, HEADS_KV, keys, DIM, CHOSEN),
        dtype,
        build,
        bytes_moved=CHOSEN * row_bytes(dtype),
        flops=4 * HEADS_Q * CHOSEN * DIM,
        ceiling=f"gather_{DIM * DTYPES[dtype].itemsize}_sorted",
        examine=agreement(TOLERANCE[dtype]),
    )


def score_case(keys: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, dtype, device)
        mean = cache.q.view(1, HEADS_KV, -1, DIM).float().mean(2).to(cache.q.dtype)

        def matvec() -> Tensor:
            return (cache.k @ mean[..., None])[..., 0].float() * DIM**-0.5

        ours = partial(tokred.qk_score, cache.q, cache.k, reduce="group_mean")
        return {"tokred.qk_score": ours, "torch, mean query": matvec}

    return Case(
        "decode",
        "score",
        (1, HEADS_Q, HEADS_KV, keys, DIM),
        dtype,
        build,
        bytes_moved=keys * (row_bytes(dtype) // 2 + 4 * HEADS_KV),
        flops=2 * HEADS_Q * keys * DIM,
        ceiling="read",
        examine=agreement(10 * TOLERANCE[dtype]),
    )


def steps(cache: Cache) -> dict[str, Callable[[], Any]]:
    """The whole step in four ways of scoring."""
    q, k, v = cache.q, cache.k, cache.v
    pooled, counts = tokred.block_pool(k, PAGE)
    generator = torch.Generator().manual_seed(2)
    dims = torch.stack([torch.randperm(DIM, generator=generator)[:24] for _ in range(HEADS_Q)])
    dims = dims.sort(-1).values.to(q.device, torch.int32)
    dominant = DominantKeys(k, dims[:HEADS_KV])

    def attend(indices: Tensor) -> tuple[Tensor, Tensor]:
        return tokred.sparse_attention(q, k, v, indices[:, :, None])

    def choose(scores: Tensor) -> Tensor:
        return tokred.topk(scores, CHOSEN, order="position")[1]

    def by_token() -> tuple[Tensor, Tensor]:
        return attend(choose(tokred.qk_score(q, k, reduce="group_mean")))

    def by_page() -> tuple[Tensor, Tensor]:
        scores = tokred.block_score(q, pooled, counts, reduce="group_mean")[:, :, 0]
        pages = tokred.topk(scores, CHOSEN // PAGE, order="position")[1]
        return attend(expand_blocks(pages, PAGE, k.shape[2]))

    def by_dims() -> tuple[Tensor, Tensor]:
        return attend(choose(tokred.qk_score(q, k, reduce="group_mean", dims=dims)))

    def by_dims_apart() -> tuple[Tensor, Tensor]:
        return fasa_attention(q, k, v, dominant, CHOSEN)

    return {"tokred step, token scores": by_token, "tokred step, page means": by_page,
            "tokred step, 24 dimensions": by_dims,
            "tokred step, 24 dimensions apart": by_dims_apart}  # fmt: skip


def step_case(keys: int, dtype: str, device: str) -> Case:
    def build() -> dict[str, Callable]:
        cache = Cache.make(keys, dtype, device)
        return {
            **steps(cache),
            "tokred.biased_attention, dense": partial(
                tokred.biased_attention, cache.q, cache.k, cache.v
            ),
            "SDPA, enable_gqa": cache.sdpa,
            "SDPA, group packed as queries": cache.sdpa_packed,
        }

    return Case("decode", "step", (1, HEADS_Q, HEADS_KV, keys, DIM, CHOSEN), dtype, build)


def combine_case(dtype: str, device: str) -> Case:
    shape = (1, HEADS_Q, 2048, DIM)

    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, *shape, generator=generator).to(device, DTYPES[dtype])
        lse_a, lse_b = torch.randn(2, *shape[:3], generator=generator).to(device)

        def written_out() -> Tensor:
            share = torch.sigmoid(lse_b - lse_a)[..., None]
            return a.float().lerp(b.float(), share).to(a.dtype)

        ours = partial(tokred.combine_states, a, lse_a, b, lse_b)
        return {"tokred.combine_states": ours, "torch": written_out}

    rows = HEADS_Q * 2048
    return Case(
        "decode",
        "combine",
        shape,
        dtype,
        build,
        bytes_moved=rows * (3 * DIM * DTYPES[dtype].itemsize + 12),
        ceiling="copy",
        examine=agreement(TOLERANCE[dtype]),
    )


def tree_case(keys: int, drafts: int, device: str) -> Case:
    """A binary tree of drafts: by position columns, beside a mask of all pairs."""

    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, HEADS_Q, drafts, DIM, generator=generator).to(device)
        k, v = torch.randn(2, 1, HEADS_KV, keys, DIM, generator=generator).to(device)
        parents = [(i - 1) // 2 for i in range(drafts)]
        entry, leave = depth_first(parents)
        at = torch.stack([torch.tensor(entry), -torch.tensor(leave)], -1).int()
        past = torch.tensor([[-drafts, -4 * drafts]]).int().expand(keys - drafts, 2)
        query, key = at[None].to(device), torch.cat([past, at])[None].to(device)
        mask = (key[:, None] <= query[:, :, None]).all(-1)[:, None]
        columns = {"query_position": query, "key_position": key}
        return {
            "tokred.biased_attention, positions": partial(
                tokred.biased_attention, q, k, v, **columns
            ),
            "tokred.biased_attention, mask": partial(tokred.biased_attention, q, k, v, mask=mask),
            "SDPA, enable_gqa, mask": partial(
                F.scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True
            ),
        }

    return Case(
        "decode",
        "tree",
        (1, HEADS_Q, HEADS_KV, drafts, keys, DIM),
        "float32",
        build,
        bytes_moved=keys * row_bytes("float32"),
        flops=4 * HEADS_Q * drafts * keys * DIM,
        ceiling="gemm_float32",
        examine=agreement(1e-4),
    )


def depth_first(parents: list[int]) -> tuple[list[int], list[int]]:
    """When a walk enters and leaves every node of a tree whose root is node 0."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    entry, leave, clock = [0] * len(parents), [0] * len(parents), 0
    stack = [(0, False)]
    while stack:
        node, done = stack.pop()
        clock += 1
        (leave if done else entry)[node] = clock
        if not done:
            stack += [(node, True), *((child, False) for child in children[node])]
    return entry, leave


def cases(run: Run) -> Iterator[Case]:
    longest = 131072
    yield dense_case(longest, "bfloat16", run.device)
    yield dense_case(longest, "float32", run.device)
    yield sparse_case(longest, "bfloat16", run.device)
    yield score_case(longest, "bfloat16", run.device)
    yield step_case(longest, "bfloat16", run.device)
    yield combine_case("bfloat16", run.device)
    yield tree_case(4096, 64, run.device)
    if run.quick:
        return
    for keys in (8192, 32768):
        for dtype in run.dtypes():
            yield dense_case(keys, dtype, run.device)
            yield sparse_case(keys, dtype, run.device)
            yield step_case(keys, dtype, run.device)
