"""Selection of the k greatest entries of rows beside torch.topk.

topk: sorted by score, as torch gives them. select: in any order (ours: by position). compact: the
positions where a mask is true, beside a stable sort, which needs no host copy either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred

from .harness import Case
from .machine import DTYPES, Run

SORTED = (((8, 131072), 2048), ((1, 131072), 2048), ((32, 50257), 50))
UNSORTED = (((18432, 289), 64),)
DISTRIBUTIONS = ("randn", "ties")


def scores(shape: tuple[int, int], dtype: str, device: str, distribution: str) -> Tensor:
    """randn, or ties: 64 different values only."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if distribution == "ties":
        x = (x * 10).round().clamp(-32, 31)
    return x.to(device, DTYPES[dtype])


def same_values(outputs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Raises unless every candidate chose the same values, in whatever order."""
    chosen = {name: out[0].float().sort(-1).values for name, out in outputs.items()}
    expected_name, expected = next(iter(chosen.items()))
    for name, actual in chosen.items():
        if not torch.equal(actual, expected):
            raise RuntimeError(f"{name} and {expected_name} chose different values")
    return {}


def topk_case(shape: tuple[int, int], k: int, dtype: str, device: str, in_order: bool,
              distribution: str = "randn") -> Case:
    rows, columns = shape

    def build() -> dict[str, Callable]:
        x = scores(shape, dtype, device, distribution)
        order = "score" if in_order else "position"
        return {
            "tokred.topk": partial(tokred.topk, x, k, order=order),
            "torch.topk": partial(torch.topk, x, k, sorted=in_order),
        }

    return Case("topk", "topk" if in_order else "select", (rows, columns, k), dtype, build,
                distribution, rows * (columns * DTYPES[dtype].itemsize + 8 * k), ceiling="read",
                examine=same_values)


def compact_case(shape: tuple[int, int], device: str) -> Case:
    rows, columns = shape

    def build() -> dict[str, Callable]:
        mask = scores(shape, "float32", device, "randn") > 1

        def stable_sort() -> tuple[Tensor, Tensor]:
            return mask.sort(dim=-1, descending=True, stable=True).indices, mask.sum(-1)

        return {"tokred.compact": partial(tokred.compact, mask), "torch sort": stable_sort}

    return Case("topk", "compact", shape, "float32", build, "16% true", rows * columns * 5,
                ceiling="read")


def cases(run: Run) -> Iterator[Case]:
    for shape, k in SORTED:
        yield topk_case(shape, k, "float32", run.device, True)
    yield topk_case(*SORTED[0], "bfloat16", run.device, True)
    for shape, k in UNSORTED:
        yield topk_case(shape, k, "float32", run.device, False)
    yield compact_case((8, 131072), run.device)
    if run.quick:
        return
    for distribution in DISTRIBUTIONS:
        for shape, k in SORTED:
            yield topk_case(shape, k, "float16", run.device, True, distribution)
            yield topk_case(shape, k, "float32", run.device, False, distribution)
