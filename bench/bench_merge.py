"""Applying a token map beside the gather and scatter_reduce that ToMe and tomesd do it with.

merge_wavg: one size-weighted merge step, features and sizes. merge_mean: tomesd's unweighted mean.
unmerge: copying slots back to tokens. compose: the maps of two layers as one, a few KB, so mostly
the cost of the call. All candidates of a case apply the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import tokred

from .bench_match import torch_plan
from .harness import Case, agreement, tokens
from .machine import DTYPES, Run

VIT_SHAPE, VIT_R = (64, 577, 768), 16
DIFFUSION_SHAPE, DIFFUSION_R = (8, 4096, 320), 1024
METRIC_CHANNELS = 64
# Outputs are averages of a few N(0, 1) tokens; the peers sum and divide in the data's dtype.
TOLERANCE = {"float32": 1e-5, "float16": 3e-2, "bfloat16": 2e-1}

Plan = tuple[Tensor, Tensor, Tensor]


def torch_merge(x: Tensor, plan: Plan, reduce: str) -> Tensor:
    """ToMe's merge: kept sources, then destinations with the leaving sources reduced into them."""
    kept, leaving, partner = (i[..., None].expand(-1, -1, x.shape[-1]) for i in plan)
    sources, destinations = x[:, ::2], x[:, 1::2]
    moved = sources.gather(1, leaving)
    reduced = destinations.scatter_reduce(1, partner, moved, reduce=reduce)
    return torch.cat([sources.gather(1, kept), reduced], dim=1)


def torch_merge_wavg(x: Tensor, size: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    y = torch_merge(x * size, plan, "sum")
    size = torch_merge(size, plan, "sum")
    return y / size, size


def torch_unmerge(y: Tensor, plan: Plan, count: int) -> Tensor:
    """Every group's value back to the places of its members."""
    kept, leaving, partner = (i[..., None].expand(-1, -1, y.shape[-1]) for i in plan)
    destinations = y[:, kept.shape[1] :]
    x = y.new_empty(y.shape[0], count, y.shape[2])
    x[:, 1::2] = destinations
    x[:, ::2].scatter_(1, kept, y[:, : kept.shape[1]])
    x[:, ::2].scatter_(1, leaving, destinations.gather(1, partner))
    return x


def token_map_of(plan: Plan, count: int) -> Tensor:
    """The same plan as a map: i32 [B, N], token -> slot."""
    kept, leaving, partner = plan
    batch, num_kept = kept.shape
    slots = torch.arange(num_kept + count // 2, dtype=torch.int32, device=kept.device)
    token_map = torch.empty(batch, count, dtype=torch.int32, device=kept.device)
    token_map[:, 1::2] = slots[num_kept:]
    token_map[:, ::2].scatter_(1, kept, slots[:num_kept].expand(batch, -1))
    token_map[:, ::2].scatter_(1, leaving, partner.int() + num_kept)
    return token_map


def plan_of(shape: tuple[int, ...], r: int, device: str, distribution: str) -> Plan:
    metric = tokens((shape[0], shape[1], METRIC_CHANNELS), "float32", device, distribution, seed=1)
    return torch_plan(metric, r)


def traffic(shape: tuple[int, ...], r: int, dtype: str) -> int:
    """Bytes of [B, N, C], [B, N - r, C], the map and the f32 sizes on both sides."""
    batch, count, channels = shape
    element = DTYPES[dtype].itemsize
    return batch * ((2 * count - r) * (channels * element + 4) + count * 4)


def wavg_case(dtype: str, distribution: str, device: str) -> Case:
    batch, count, channels = VIT_SHAPE
    num_out = count - VIT_R

    def build() -> dict[str, Callable]:
        x = tokens(VIT_SHAPE, dtype, device)
        plan = plan_of(VIT_SHAPE, VIT_R, device, distribution)
        token_map = token_map_of(plan, count)
        size = torch.randint(1, 4, (batch, count), generator=torch.Generator().manual_seed(2))
        size = size.float().to(device)
        out = torch.zeros(batch, num_out, channels, dtype=x.dtype, device=device)
        out_size = torch.zeros(batch, num_out, device=device)
        column = size[..., None].to(x.dtype)
        return {
            "tokred.merge": partial(tokred.merge, x, token_map, num_out, size),
            "tokred.merge, out=": partial(
                tokred.merge, x, token_map, num_out, size, out=out, out_size=out_size
            ),
            "torch": partial(torch_merge_wavg, x, column, plan),
        }

    return Case(
        "merge",
        "merge_wavg",
        VIT_SHAPE,
        dtype,
        build,
        distribution,
        bytes_moved=traffic(VIT_SHAPE, VIT_R, dtype),
        ceiling="copy",
        examine=agreement(TOLERANCE[dtype]),
    )


def merge_mean_case(dtype: str, distribution: str, device: str) -> Case:
    count = DIFFUSION_SHAPE[1]

    def build() -> dict[str, Callable]:
        x = tokens(DIFFUSION_SHAPE, dtype, device)
        plan = plan_of(DIFFUSION_SHAPE, DIFFUSION_R, device, distribution)
        token_map, num_out = token_map_of(plan, count), count - DIFFUSION_R
        return {
            "tokred.merge": partial(tokred.merge, x, token_map, num_out, mode="plain_mean"),
            "torch": partial(torch_merge, x, plan, "mean"),
        }

    return Case(
        "merge",
        "merge_mean",
        DIFFUSION_SHAPE,
        dtype,
        build,
        distribution,
        bytes_moved=traffic(DIFFUSION_SHAPE, DIFFUSION_R, dtype),
        ceiling="copy",
        examine=agreement(TOLERANCE[dtype]),
    )


def unmerge_case(
    shape: tuple[int, ...], r: int, dtype: str, distribution: str, device: str
) -> Case:
    batch, count, channels = shape

    def build() -> dict[str, Callable]:
        y = tokens((batch, count - r, channels), dtype, device)
        plan = plan_of(shape, r, device, distribution)
        token_map = token_map_of(plan, count)
        index = token_map.long()[..., None].expand(-1, -1, channels)
        return {
            "tokred.unmerge": partial(tokred.unmerge, y, token_map),
            "torch gather": partial(torch.gather, y, 1, index),
            "torch scatter": partial(torch_unmerge, y, plan, count),
        }

    return Case(
        "merge",
        "unmerge",
        shape,
        dtype,
        build,
        distribution,
        bytes_moved=traffic(shape, r, dtype),
        ceiling="copy",
        examine=agreement(0.0),
    )


def torch_compose(second: Tensor, first: Tensor) -> Tensor:
    chained = second.gather(1, first.clamp_min(0).long())
    return torch.where(first < 0, -1, chained)


def compose_case(distribution: str, device: str) -> Case:
    batch, count, _ = VIT_SHAPE

    def build() -> dict[str, Callable]:
        first = token_map_of(plan_of(VIT_SHAPE, VIT_R, device, distribution), count)
        fewer = (batch, count - VIT_R, METRIC_CHANNELS)
        second = token_map_of(plan_of(fewer, VIT_R, device, distribution), fewer[1])
        return {
            "tokred.compose": partial(tokred.compose, second, first),
            "torch": partial(torch_compose, second, first),
        }

    return Case(
        "merge",
        "compose",
        (batch, count),
        "int32",
        build,
        distribution,
        bytes_moved=batch * (3 * count - VIT_R) * 4,
        ceiling="copy",
        examine=agreement(0.0),
    )


def cases(run: Run) -> Iterator[Case]:
    distributions = ("randn",) if run.quick else ("randn", "correlated", "ties")
    for dtype in run.dtypes():
        for distribution in distributions:
            yield wavg_case(dtype, distribution, run.device)
            yield merge_mean_case(dtype, distribution, run.device)
        yield unmerge_case(VIT_SHAPE, VIT_R, dtype, "randn", run.device)
        yield unmerge_case(DIFFUSION_SHAPE, DIFFUSION_R, dtype, "randn", run.device)
    yield compose_case("randn", run.device)
