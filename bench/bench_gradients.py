"""Backward passes of merging, pooling and matching, compared with the same formulas in torch.

merge_wavg, unmerge: the gradient of the tokens, by autograd of ToMe's gather and scatter_reduce.
segment_pool: of a cache of keys. sinkhorn: of tokens and 126 anchors, in 10 rounds. Forward passes
have run before the clock starts. The gradients of attention are in sparse_attn, block_sparse
and linear_attn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tokred

from .bench_match import torch_sinkhorn
from .bench_merge import (
    TOLERANCE,
    VIT_R,
    VIT_SHAPE,
    plan_of,
    token_map_of,
    torch_merge_wavg,
    traffic,
)
from .bench_segments import SEGMENTS, ids_of, segments, torch_pool
from .bench_segments import SHAPE as POOL_SHAPE
from .harness import Case, agreement, tokens
from .machine import DTYPES, Run

TRANSPORT = (4, 603, 1152), 126, 10  # tokens, anchors, rounds
SINKHORN_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def backward(out: Tensor, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """The gradient of x, again and again."""
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def leaf(shape: tuple[int, ...], dtype: str, device: str, seed: int = 0) -> Tensor:
    return tokens(shape, dtype, device, seed=seed).requires_grad_()


def merge_case(dtype: str, device: str) -> Case:
    batch, count, channels = VIT_SHAPE

    def build() -> dict[str, Callable]:
        x, plan = leaf(VIT_SHAPE, dtype, device), plan_of(VIT_SHAPE, VIT_R, device, "randn")
        size = torch.randint(1, 4, (batch, count), generator=torch.Generator().manual_seed(2))
        size = size.float().to(device)
        grad = tokens((batch, count - VIT_R, channels), dtype, device, seed=3)
        ours, _ = tokred.merge(x, token_map_of(plan, count), count - VIT_R, size)
        theirs, _ = torch_merge_wavg(x, size[..., None].to(x.dtype), plan)
        return {"tokred.merge": backward(ours, x, grad), "torch": backward(theirs, x, grad)}

    return Case("gradients", "merge_wavg", VIT_SHAPE, dtype, build,
                bytes_moved=traffic(VIT_SHAPE, VIT_R, dtype), ceiling="copy",
                examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def unmerge_case(dtype: str, device: str) -> Case:
    batch, count, channels = VIT_SHAPE

    def build() -> dict[str, Callable]:
        y = leaf((batch, count - VIT_R, channels), dtype, device)
        token_map = token_map_of(plan_of(VIT_SHAPE, VIT_R, device, "randn"), count)
        grad = tokens(VIT_SHAPE, dtype, device, seed=3)
        index = token_map.long()[..., None].expand(-1, -1, channels)
        return {
            "tokred.unmerge": backward(tokred.unmerge(y, token_map), y, grad),
            "torch gather": backward(y.gather(1, index), y, grad),
        }

    return Case("gradients", "unmerge", VIT_SHAPE, dtype, build,
                bytes_moved=traffic(VIT_SHAPE, VIT_R, dtype), ceiling="copy",
                examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def pool_case(mode: str, dtype: str, device: str) -> Case:
    batch, count, channels = POOL_SHAPE

    def build() -> dict[str, Callable]:
        x = tokens(POOL_SHAPE, dtype, device, "correlated").requires_grad_()
        grad = tokens((batch, SEGMENTS, channels), dtype, device, seed=3)
        offsets = segments(batch, count, SEGMENTS, device)
        lengths, index = offsets.diff(dim=-1), ids_of(offsets, count).long()
        middle = (offsets[:, :-1] + lengths // 2).long()
        ours = tokred.segment_pool(x, offsets, mode=mode)
        theirs = torch_pool(x, index, lengths, middle, mode)
        return {"tokred.segment_pool": backward(ours, x, grad), "torch": backward(theirs, x, grad)}

    moved = batch * (count + SEGMENTS) * channels * DTYPES[dtype].itemsize
    return Case("gradients", f"segment_pool {mode}", POOL_SHAPE, dtype, build, "correlated",
                bytes_moved=moved, ceiling="copy", examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def sinkhorn_case(dtype: str, device: str) -> Case:
    shape, anchors, steps = TRANSPORT

    def build() -> dict[str, Callable]:
        x, some = (
            leaf(shape, dtype, device),
            tokens((shape[0], anchors, shape[2]), dtype, device, seed=1),
        )
        ours = tokred.sinkhorn(x, some, iterations=steps, tolerance=0).aggregation
        theirs = torch_sinkhorn(x, some, steps)
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3)).to(theirs)
        return {"tokred.sinkhorn": backward(ours, x, grad), "torch": backward(theirs, x, grad)}

    return Case("gradients", f"sinkhorn, {anchors} anchors", shape, dtype, build,
                examine=agreement(SINKHORN_TOLERANCE[dtype]))  # fmt: skip


def cases(run: Run) -> Iterator[Case]:
    for dtype in ("float32",) if run.quick else ("float32", "bfloat16"):
        yield merge_case(dtype, run.device)
        yield unmerge_case(dtype, run.device)
        for mode in ("mean",) if run.quick else ("mean", "amax", "gaussian"):
            yield pool_case(mode, dtype, run.device)
        yield sinkhorn_case(dtype, run.device)
