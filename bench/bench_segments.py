"""Pooling over segments of tokens beside index_add, scatter_reduce and loops of torch.

segment_pool: a cache of keys pooled by runs of unequal length, for every mode; segment_weights: the
weights of the Gaussian kernel alone; adjacent_runs: the runs themselves. forest_merge: the trees of
a video of 32 frames, beside doubling of pointers (forest_roots) and index_add. ema_scan: beside the
loop over tokens of torch.
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


def torch_runs(x: Tensor, threshold: float) -> Tensor:
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    joins = (unit[:, :-1] * unit[:, 1:]).sum(-1) >= threshold
    return torch.nn.functional.pad((~joins).cumsum(1), (1, 0))


def runs_case(dtype: str, device: str) -> Case:
    batch, count, channels = SHAPE

    def build() -> dict[str, Callable]:
        x = tokens(SHAPE, dtype, device, "correlated")
        return {
            "tokred.adjacent_runs": lambda: tokred.adjacent_runs(x, 0.9).ids,
            "torch": partial(torch_runs, x, 0.9),
        }

    def examine(outputs: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        first, second = outputs.values()
        apart = (first.diff(dim=1) != second.diff(dim=1)).float().mean().item()
        if apart > 1e-3:
            raise RuntimeError(f"{apart:.2%} of the boundaries differ")
        return {}

    moved = batch * count * (channels * DTYPES[dtype].itemsize + 16)
    return Case("segments", "adjacent_runs", SHAPE, dtype, build, "correlated", bytes_moved=moved,
                ceiling="read", examine=examine)  # fmt: skip


FRAMES, FRAME_TOKENS, FRAME_CHANNELS = 32, 196, 1024


def torch_forest(x: Tensor, parent: Tensor) -> Tensor:
    position = torch.arange(parent.shape[1], device=x.device)
    root = torch.where(parent < 0, position, parent).long()
    for _ in range(FRAMES.bit_length()):
        root = root.gather(1, root)
    count = torch.zeros(parent.shape, device=x.device).scatter_add_(
        1, root, torch.ones_like(x[..., 0]).float()
    )
    return torch_sums(x, root, parent.shape[1]) / count.clamp_min(1)[..., None].to(x.dtype)


def forest_case(dtype: str, device: str) -> Case:
    shape = (1, FRAMES * FRAME_TOKENS, FRAME_CHANNELS)

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device)
        generator = torch.Generator().manual_seed(4)
        above = torch.randint(0, FRAME_TOKENS, (1, shape[1]), generator=generator)
        frame = torch.arange(shape[1]) // FRAME_TOKENS
        joins = (torch.rand(1, shape[1], generator=generator) < 0.7) & (frame > 0)
        parent = torch.where(joins, (frame - 1) * FRAME_TOKENS + above, -1).int().to(device)
        return {
            "tokred.forest_merge": partial(tokred.forest_merge, x, parent),
            "torch": partial(torch_forest, x, parent),
        }

    moved = 2 * shape[1] * shape[2] * DTYPES[dtype].itemsize
    return Case("segments", "forest_merge", shape, dtype, build, bytes_moved=moved, ceiling="copy",
                examine=agreement(TOLERANCE[dtype]))  # fmt: skip


SCAN_SHAPE = (4, 2048, 1024)


def torch_scan(c: Tensor, p: Tensor) -> Tensor:
    z = torch.zeros_like(c[:, 0], dtype=torch.float32)
    out = torch.empty_like(c)
    for i in range(c.shape[1]):
        z = torch.lerp(z, c[:, i].float(), p[:, i, None])
        out[:, i] = z
    return out


def scan_case(dtype: str, device: str) -> Case:
    batch, count, channels = SCAN_SHAPE

    def build() -> dict[str, Callable]:
        c = tokens(SCAN_SHAPE, dtype, device)
        p = torch.rand(batch, count, generator=torch.Generator().manual_seed(5)).to(device)
        return {
            "tokred.ema_scan": partial(tokred.ema_scan, c, p),
            "torch loop": partial(torch_scan, c, p),
        }

    moved = 2 * batch * count * channels * DTYPES[dtype].itemsize
    return Case("segments", "ema_scan", SCAN_SHAPE, dtype, build, bytes_moved=moved, ceiling="copy",
                examine=agreement(TOLERANCE[dtype]))  # fmt: skip


def cases(run: Run) -> Iterator[Case]:
    for dtype in run.dtypes():
        for mode in ("mean", "gaussian") if run.quick else ("mean", "amax", "gaussian"):
            yield pool_case(mode, dtype, run.device)
        yield weights_case(dtype, run.device)
        yield runs_case(dtype, run.device)
        yield forest_case(dtype, run.device)
        yield scan_case(dtype, run.device)
