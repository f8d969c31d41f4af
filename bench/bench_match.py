"""Bipartite matching beside its torch formulations, tomesd and flash-kmeans.

match: the best partner of every row of a among the rows of b; match_8: the eight best. plan: the
whole ToMe plan with its class token, r = N / 4. threshold: a plan of every pair above a threshold.
plan_2d: tomesd's plan, one destination in every 2x2 cell, half the tokens merged. assignment: exact
one-to-one matching, beside scipy and, where it is installed, lapx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

import tokred
from tokred.methods.tomesd import random2d_plan

from .harness import Case, agreement, tokens
from .machine import DTYPES, Run

SHAPES = ((64, 577, 64), (8, 4096, 64))
MORE_SHAPES = ((64, 197, 64), (16, 1024, 64))
THRESHOLD = 0.5
DISTRIBUTIONS = ("randn", "correlated", "ties")
# The similarities of one pair of rows, rounded twice, in the coarsest step of the dtype.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}


def torch_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a = a / a.norm(dim=-1, keepdim=True)
    b = b / b.norm(dim=-1, keepdim=True)
    score, index = (a @ b.transpose(-1, -2)).max(dim=-1)
    return score, index


def torch_plan(metric: Tensor, r: int, num_prefix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's plan (arXiv 2210.09461) as indices: kept sources, leaving sources, their partners."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    if num_prefix:
        similarity[:, 0] = float("-inf")
    best, partner = similarity.max(dim=-1)
    ranked = best.argsort(dim=-1, descending=True)
    leaving, kept = ranked[:, :r], ranked[:, r:]
    if num_prefix:
        kept = kept.sort(dim=-1).values
    return kept, leaving, partner.gather(1, leaving)


def flash_kmeans_match(a: Tensor, b: Tensor) -> tuple[None, Tensor]:
    """Indices only. The kernel wants b normalised; the norm of a row of a changes no choice."""
    from flash_kmeans.assign_euclid_triton import cosine_assign_triton

    return None, cosine_assign_triton(a, b / b.norm(dim=-1, keepdim=True))


def match_case(shape: tuple[int, ...], dtype: str, distribution: str, device: str) -> Case:
    batch, count, channels = shape
    sources, destinations = (count + 1) // 2, count // 2
    element = DTYPES[dtype].itemsize

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device, distribution)
        a, b = x[:, ::2], x[:, 1::2]
        candidates = {"torch": partial(torch_match, a, b)}
        if device == "cuda" and find_spec("flash_kmeans"):
            candidates["flash-kmeans"] = partial(flash_kmeans_match, a, b)
        return {"tokred.match": partial(tokred.match, a, b), **candidates}

    def examine(outputs: dict) -> dict:
        scored = {name: out for name, out in outputs.items() if out[0] is not None}
        return agreement(TOLERANCE[dtype])(scored)

    return Case(
        "match",
        "match",
        shape,
        dtype,
        build,
        distribution,
        bytes_moved=batch * (count * channels * element + sources * 8),
        flops=2 * batch * sources * destinations * channels,
        ceiling=f"gemm_{dtype}",
        examine=examine,
    )


def torch_many(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    a = a / a.norm(dim=-1, keepdim=True)
    b = b / b.norm(dim=-1, keepdim=True)
    score, index = (a @ b.transpose(-1, -2)).topk(k, dim=-1)
    return score, index


def many_case(shape: tuple[int, ...], k: int, dtype: str, device: str) -> Case:
    batch, count, channels = shape
    sources, destinations = (count + 1) // 2, count // 2

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device)
        a, b = x[:, ::2], x[:, 1::2]
        return {
            "tokred.match": partial(tokred.match, a, b, k=k),
            "torch": partial(torch_many, a, b, k),
        }

    return Case(
        "match",
        f"match_{k}",
        shape,
        dtype,
        build,
        bytes_moved=batch * (count * channels * DTYPES[dtype].itemsize + sources * 8 * k),
        flops=2 * batch * sources * destinations * channels,
        ceiling=f"gemm_{dtype}",
        examine=agreement(TOLERANCE[dtype]),
    )


def plan_case(shape: tuple[int, ...], dtype: str, distribution: str, device: str) -> Case:
    batch, count, channels = shape
    r = count // 4

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device, distribution)
        return {
            "tokred.bipartite_soft_matching": partial(
                tokred.bipartite_soft_matching, x, r, num_prefix=1
            ),
            "torch": partial(torch_plan, x, r, num_prefix=1),
        }

    return Case(
        "match",
        "plan",
        shape,
        dtype,
        build,
        distribution,
        bytes_moved=batch * count * (channels * DTYPES[dtype].itemsize + 4),
        flops=2 * batch * (count // 2) * ((count + 1) // 2) * channels,
        ceiling=f"gemm_{dtype}",
    )


def torch_threshold(metric: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """A map by threshold: kept sources first, in order, then the destinations."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    best, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)).max(dim=-1)
    leaves = best > threshold
    kept = (~leaves).cumsum(dim=-1)
    count = kept[:, -1:]
    sources = torch.where(leaves, count + partner, kept - 1)
    destinations = count + torch.arange(metric.shape[1] // 2, device=metric.device)
    token_map = torch.empty(metric.shape[:2], dtype=torch.int32, device=metric.device)
    token_map[:, ::2], token_map[:, 1::2] = sources.int(), destinations.int()
    return token_map, count[:, 0].int() + metric.shape[1] // 2


def threshold_case(shape: tuple[int, ...], dtype: str, distribution: str, device: str) -> Case:
    batch, count, channels = shape

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device, distribution)
        return {
            "tokred.threshold_matching": partial(
                tokred.threshold_matching, x, THRESHOLD, order="position"
            ),
            "torch": partial(torch_threshold, x, THRESHOLD),
        }

    return Case(
        "match",
        "threshold",
        shape,
        dtype,
        build,
        distribution,
        bytes_moved=batch * count * (channels * DTYPES[dtype].itemsize + 4),
        flops=2 * batch * (count // 2) * ((count + 1) // 2) * channels,
        ceiling=f"gemm_{dtype}",
    )


def plan_2d_case(shape: tuple[int, ...], dtype: str, distribution: str, device: str) -> Case:
    from tomesd.merge import bipartite_soft_matching_random2d

    batch, count, channels = shape
    side, r = int(count**0.5), count // 2

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device, distribution)
        return {
            "tokred.methods.tomesd": partial(random2d_plan, x, side, side, r),
            "tomesd": partial(
                bipartite_soft_matching_random2d, x, side, side, 2, 2, r, no_rand=True
            ),
        }

    return Case(
        "match",
        "plan_2d",
        shape,
        dtype,
        build,
        distribution,
        bytes_moved=batch * count * (channels * DTYPES[dtype].itemsize + 4),
        flops=2 * batch * (count * 3 // 4) * (count // 4) * channels,
        ceiling=f"gemm_{dtype}",
    )


def assignment_costs(shape: tuple[int, ...], distribution: str, device: str) -> Tensor:
    batch, rows, columns = shape
    if distribution == "cosine":
        x, y = (tokens((batch, n, 64), "float32", device) for n in (rows, columns))
        y = y.roll(1, 2)
        return (
            1 - torch.nn.functional.normalize(x, dim=2) @ torch.nn.functional.normalize(y, dim=2).mT
        )
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return (uniform * 100).floor() if distribution == "integers" else uniform


def scipy_assignment(costs: np.ndarray) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    return torch.stack([torch.from_numpy(linear_sum_assignment(cost)[1]) for cost in costs])


def lapx_assignment(costs: np.ndarray, solver: str) -> Tensor:
    import lap

    results = getattr(lap, solver)(costs, n_threads=torch.get_num_threads())
    return torch.stack([torch.from_numpy(columns) for columns in results[-1]])


def assignment_case(shape: tuple[int, ...], distribution: str, device: str) -> Case:
    batch, rows, columns = shape

    def build() -> dict[str, Callable]:
        costs = assignment_costs(shape, distribution, device)
        candidates: dict[str, Callable] = {
            "tokred.linear_assignment": partial(tokred.linear_assignment, costs),
        }
        if device == "cpu":
            arrays = costs.numpy()
            candidates["scipy"] = partial(scipy_assignment, arrays)
            if find_spec("lap"):
                for solver in ("lapjvx_batch", "lapjvr_batch"):
                    candidates[f"lapx {solver}"] = partial(lapx_assignment, arrays, solver)
        return candidates

    def examine(outputs: dict) -> dict:
        costs = assignment_costs(shape, distribution, device)
        totals = {}
        for name, out in outputs.items():
            index = (out if isinstance(out, Tensor) else out.index).long()
            totals[name] = costs.double().gather(2, index.to(device)[..., None]).sum().item()
        smallest = min(totals.values())
        if max(totals.values()) > smallest + 1e-9 * abs(smallest) + 1e-9:
            raise AssertionError(f"not the same total cost: {totals}")
        return {}

    return Case(
        "match",
        "assignment",
        shape,
        "float32",
        build,
        distribution,
        bytes_moved=batch * (4 * rows * columns + 12 * rows + 8 * columns),
        examine=examine,
    )


def torch_sinkhorn(x: Tensor, anchors: Tensor, steps: int) -> Tensor:
    """Scaling vectors of a kernel matrix, and the plan, as AOT and PLOT write it."""
    unit = [torch.nn.functional.normalize(t.float(), dim=-1) for t in (x, anchors)]
    kernel = torch.exp((unit[0] @ unit[1].mT - 1) / 0.1)
    batch, sources, targets = kernel.shape
    c = torch.ones(batch, targets, 1, device=x.device)
    for _ in range(steps):
        r = 1 / sources / (kernel @ c)
        c = 1 / targets / (kernel.mT @ r)
    return (r * kernel * c.mT).mT @ x.float()


def sinkhorn_case(
    shape: tuple[int, ...], anchors: int, steps: int, dtype: str, device: str
) -> Case:
    batch, sources, channels = shape

    def build() -> dict[str, Callable]:
        x = tokens(shape, dtype, device)
        some = x[:, :: sources // anchors][:, :anchors]

        def ours() -> Tensor:
            return tokred.sinkhorn(x, some, iterations=steps, tolerance=0).aggregation

        return {"tokred.sinkhorn": ours, "torch": partial(torch_sinkhorn, x, some, steps)}

    def examine(outputs: dict) -> dict:
        torch.testing.assert_close(*outputs.values(), rtol=1e-3, atol=1e-5)
        return {}

    return Case(
        "match",
        "sinkhorn",
        (batch, sources, anchors, channels),
        dtype,
        build,
        bytes_moved=batch * channels * ((sources + anchors) * DTYPES[dtype].itemsize + anchors * 4),
        flops=4 * batch * sources * anchors * channels,
        ceiling=f"gemm_{dtype}",
        examine=examine,
    )


def cases(run: Run) -> Iterator[Case]:
    shapes = SHAPES if run.quick else SHAPES + MORE_SHAPES
    for dtype in run.dtypes():
        for shape in shapes:
            for distribution in DISTRIBUTIONS[:1] if run.quick else DISTRIBUTIONS:
                yield match_case(shape, dtype, distribution, run.device)
    for dtype in run.dtypes()[:1] if run.quick else run.dtypes():
        for shape in shapes:
            yield plan_case(shape, dtype, "correlated", run.device)
        yield many_case(shapes[0], 8, dtype, run.device)
        yield threshold_case(shapes[0], dtype, "correlated", run.device)
        if find_spec("tomesd"):
            yield plan_2d_case((2, 4096, 320), dtype, "randn", run.device)
    for distribution in ("uniform", "cosine", "integers"):
        yield assignment_case((1, 1024, 1024), distribution, run.device)
    yield assignment_case((64, 256, 256), "uniform", run.device)
    for dtype in run.dtypes():
        yield sinkhorn_case((8, 603, 1152), 126, 10, dtype, run.device)
