"""Block-sparse attention beside compiled FlexAttention, and beside dense attention of our own.

random: blocks kept at random, the diagonal always. causal: the same below the diagonal, beside our
dense causal kernel and SDPA. backward: gradients of q, k and v, at a quarter of the blocks, and of
lists of a quarter of the keys for every 64 queries, beside our dense ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred

from .harness import Case, agreement
from .machine import DTYPES, Run

TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


def random_blocks(heads: int, blocks: int, density: float, causal: bool) -> Tensor:
    """bool [1, H, n, n] with exactly that share of its (lower triangle's) blocks, in total."""
    generator = torch.Generator().manual_seed(1)
    chance = torch.rand(1, heads, blocks, blocks, generator=generator)
    chance.diagonal(dim1=-2, dim2=-1).fill_(-1)
    possible = blocks * blocks
    if causal:
        chance.masked_fill_(torch.ones(blocks, blocks, dtype=torch.bool).triu(1), 2)
        possible = blocks * (blocks + 1) // 2
    kept = chance.flatten(2).argsort(-1)[..., : round(density * possible)]
    mask = torch.zeros(1, heads, blocks * blocks, dtype=torch.bool).scatter(-1, kept, True)
    return mask.unflatten(-1, (blocks, blocks))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = mask.sum(-1, dtype=torch.int32)
    order = mask.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # As blocks that a mask function could thin out: Inductor's C++ does not compile whole ones.
    blocks = BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=block, seq_lengths=(q.shape[2], k.shape[2])
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, block_mask=blocks)


def block_case(
    heads: int,
    tokens: int,
    dim: int,
    block: int,
    density: float,
    dtype: str,
    device: str,
    causal: bool = False,
) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (x.to(device, DTYPES[dtype])
                   for x in torch.randn(3, 1, heads, tokens, dim, generator=generator))  # fmt: skip
        mask = random_blocks(heads, tokens // block, density, causal).to(device)
        ours = {
            "tokred.block_sparse_attention": partial(
                tokred.block_sparse_attention, q, k, v, mask, block, block, causal=causal
            )
        }
        if causal:
            dense = partial(tokred.biased_attention, q, k, v, causal=True)
            sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            return ours | {"tokred.biased_attention, dense": dense, "SDPA, dense": sdpa}
        return ours | {"FlexAttention, compiled": flex_attention(q, k, v, mask, block)}

    pairs = tokens * tokens // (2 if causal else 1)
    name = f"{'causal' if causal else 'random'} {block}x{block} at {density:.0%}"
    return Case(
        "block_sparse",
        name,
        (1, heads, tokens, dim),
        dtype,
        build,
        bytes_moved=4 * heads * tokens * dim * DTYPES[dtype].itemsize,
        flops=int(4 * heads * pairs * dim * density),
        ceiling=f"gemm_{dtype}",
        examine=None if causal else agreement(TOLERANCE[dtype]),
    )


def backward_case(heads: int, tokens: int, dim: int, device: str) -> Case:
    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        inputs = [x.to(device).requires_grad_()
                  for x in torch.randn(3, 1, heads, tokens, dim, generator=generator)]  # fmt: skip
        mask = random_blocks(heads, tokens // 64, 0.25, False).to(device)
        keys = torch.rand(1, heads, tokens // 64, tokens, generator=generator)
        lists = keys.argsort(-1)[..., : tokens // 4].sort(-1).values.to(device, torch.int32)
        grad_out = torch.randn(1, heads, tokens, dim, generator=generator).to(device)

        def backward_of(out: Tensor) -> Callable:
            return partial(torch.autograd.grad, out, inputs, grad_out, retain_graph=True)

        blocks = tokred.block_sparse_attention(*inputs, mask, 64, 64)[0]
        listed = tokred.sparse_attention(*inputs, lists, block_q=64)[0]
        return {
            "tokred.block_sparse_attention": backward_of(blocks),
            "tokred.sparse_attention": backward_of(listed),
            "tokred.biased_attention, dense": backward_of(tokred.biased_attention(*inputs)[0]),
            "SDPA, dense": backward_of(F.scaled_dot_product_attention(*inputs)),
        }

    return Case(
        "block_sparse",
        "backward at 25%",
        (1, heads, tokens, dim),
        "float32",
        build,
        bytes_moved=28 * heads * tokens * dim,
        flops=10 * heads * tokens**2 * dim // 4,
        ceiling="gemm_float32",
    )


def cases(run: Run) -> Iterator[Case]:
    yield block_case(8, 4096, 128, 64, 0.23, "float32", run.device)
    yield block_case(8, 4096, 128, 128, 0.23, "float32", run.device)
    yield block_case(8, 8192, 128, 128, 0.25, "float32", run.device, causal=True)
    yield backward_case(8, 2048, 64, run.device)
    if run.quick:
        return
    for density in (0.1, 0.5):
        yield block_case(8, 4096, 128, 64, density, "float32", run.device)
    yield block_case(8, 4096, 128, 64, 0.23, "bfloat16", run.device)
