"""Pooling over segments of tokens beside index_add, scatter_reduce and loops of torch.

segment_pool: a cache of keys pooled by runs of unequal length, for every mode; segment_weights: the
weights of the Gaussian kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import tokred

from .harness import Case, agreement, tokens
from .machine import DTYPES, Run

SHAPE, SEGMENTS = (32, 4096, 128), 1365  # heads of a cache of 4096 keys, three keys a segment
TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}


def segments(batch: int, count: int, number: int, device: str) -> Tensor:
    """Offsets i32 [B, S + 1] of segments of unequal length."""
    generator = torch.Generator().manual_seed(3)
    cuts = torch.rand(batch, count - 1, generator=generator).argsort(-1)[:, : number - 1] + 1
    ends = torch.tensor([0, count]).expand(batch, 2)
    return torch.cat([ends[:, :1], cuts.sort(-1).values, ends[:, 1:]], 1).int().to(device)


def ids_of(offsets: Tensor, count: int) -> Tensor:
    position = torch.arange(count, dtype=torch.int32, device=offsets.device)
    position = position.expand(offsets.shape[0], count).contiguous()
    return torch.searchsorted(offsets, position, right=True, out_int32=True) - 1


def torch_sums(values: Tensor, index: Tensor, number: int) -> Tensor:
    """values [B, N, C] summed by segment, as index_add over the flattened batch."""
    batch, _, channels = values.shape
    rows = (index + torch.arange(batch, device=index.device)[:, None] * number).reshape(-1)
    out = values.new_zeros(batch * number, channels)
    out.index_add_(0, rows, values.reshape(-1, channels))
    return out.view(batch, number, channels)


def torch_gaussian_weights(x: Tensor, index: Tensor, middle: Tensor, number: int) -> Tensor:
    pivots = x.gather(1, middle.gather(1, index)[..., None].expand_as(x))
    distance = (x - pivots).float().square().sum(-1, keepdim=True)
    count = torch_sums(torch.ones_like(distance), index, number)
    variance = torch_sums(distance, index, number) / count + 1e-8
    kernel = (-0.5 * distance / variance.gather(1, index[..., None])).exp()
    return (kernel / torch_sums(kernel, index, number).gather(1, index[..., None]))[..., 0]


def torch_pool(x: Tensor, index: Tensor, lengths: Tensor, middle: Tensor, mode: str) -> Tensor:
    number = lengths.shape[1]
    if mode == "amax":
        out = x.new_zeros(x.shape[0], number, x.shape[2])
        where = index[..., None].expand_as(x)
        return out.scatter_reduce(1, where, x, "amax", include_self=False)
    if mode == "gaussian":
        weights = torch_gaussian_weights(x, index, middle, number).to(x.dtype)
        return torch_sums(x * weights[..., None], index, number)
    return torch_sums(x, index, number) / lengths[..., None].to(x.dtype)


def pool_case(mode: str, dtype: str, device: str) -> Case:
    batch, count, channels = SHAPE

    def build() -> dict[str, Callable]:
        x = tokens(SHAPE, dtype, device, "correlated")
        offsets = segments(batch, count, SEGMENTS, device)
        ids, lengths = ids_of(offsets, count), offsets.diff(dim=-1)
        middle = (offsets[:, :-1] + lengths // 2).long()
        index = ids.long()
        return {
            "tokred, offsets": partial(tokred.segment_pool, x, offsets, mode=mode),
            "tokred, ids": partial(
                tokred.segment_pool, x, ids=ids, num_segments=SEGMENTS, mode=mode
            ),
            "torch": partial(torch_pool, x, index, lengths, middle, mode),
        }

    element = DTYPES[dtype].itemsize
    moved = batch * ((count + SEGMENTS) * channels * element + count * 4)
    return Case("segments", f"segment_pool {mode}", SHAPE, dtype, build, "correlated",
                bytes_moved=moved, ceiling="copy", examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def weights_case(dtype: str, device: str) -> Case:
    batch, count, channels = SHAPE

    def build() -> dict[str, Callable]:
        x = tokens(SHAPE, dtype, device, "correlated")
        offsets = segments(batch, count, SEGMENTS, device)
        ids, lengths = ids_of(offsets, count), offsets.diff(dim=-1)
        middle, index = (offsets[:, :-1] + lengths // 2).long(), ids.long()
        how = {"ids": ids, "num_segments": SEGMENTS, "mode": "gaussian", "x": x}
        return {
            "tokred.segment_weights": partial(tokred.segment_weights, **how),
            "torch": partial(torch_gaussian_weights, x, index, middle, SEGMENTS),
        }

    moved = batch * count * (channels * DTYPES[dtype].itemsize + 8)
    return Case("segments", "segment_weights gaussian", SHAPE, dtype, build, "correlated",
                bytes_moved=moved, ceiling="read",
                examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def cases(run: Run) -> Iterator[Case]:
    for dtype in run.dtypes():
        for mode in ("mean", "gaussian") if run.quick else ("mean", "amax", "gaussian"):
            yield pool_case(mode, dtype, run.device)
        yield weights_case(dtype, run.device)
