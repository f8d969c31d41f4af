"""Selection of the k largest entries of rows beside torch.topk.

topk: sorted by score, as torch gives them. select: in any order (ours: by position). compact: the
positions where a mask is true, beside a stable sort, which needs no host copy either. gather: the
hidden states, keys and values of chosen tokens in one call. sample: inverse transform sampling of
token scores (ATS). evict: which key goes in a step of H2O, and the next token in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred

from .harness import Case, agreement
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


def topk_case(
    shape: tuple[int, int],
    k: int,
    dtype: str,
    device: str,
    in_order: bool,
    distribution: str = "randn",
) -> Case:
    rows, columns = shape

    def build() -> dict[str, Callable]:
        x = scores(shape, dtype, device, distribution)
        order = "score" if in_order else "position"
        return {
            "tokred.topk": partial(tokred.topk, x, k, order=order),
            "torch.topk": partial(torch.topk, x, k, sorted=in_order),
        }

    return Case(
        "topk",
        "topk" if in_order else "select",
        (rows, columns, k),
        dtype,
        build,
        distribution,
        rows * (columns * DTYPES[dtype].itemsize + 8 * k),
        ceiling="read",
        examine=same_values,
    )


def compact_case(shape: tuple[int, int], device: str) -> Case:
    rows, columns = shape

    def build() -> dict[str, Callable]:
        mask = scores(shape, "float32", device, "randn") > 1

        def stable_sort() -> tuple[Tensor, Tensor]:
            return mask.sort(dim=-1, descending=True, stable=True).indices, mask.sum(-1)

        return {"tokred.compact": partial(tokred.compact, mask), "torch sort": stable_sort}

    return Case(
        "topk", "compact", shape, "float32", build, "16% true", rows * columns * 5, ceiling="read"
    )


def gather_case(batch: int, tokens: int, kept: int, device: str) -> Case:
    """Hidden states [B, N, 768] and keys and values [B, 12, N, 64] in float32."""

    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(batch, tokens, 768, generator=generator).to(device)
        k, v = torch.randn(2, batch, 12, tokens, 64, generator=generator).to(device)
        order = torch.rand(batch, tokens, generator=generator).argsort(-1)[:, :kept]
        indices = order.sort(-1).values.to(device, torch.int32)
        wide = indices.long()

        def torch_gather() -> list[Tensor]:
            heads = wide[:, None, :, None].expand(-1, 12, -1, 64)
            rows = hidden.gather(1, wide[..., None].expand(-1, -1, 768))
            return [rows, k.gather(2, heads), v.gather(2, heads)]

        ours = partial(tokred.gather_tokens, (hidden, k, v), indices)
        return {"tokred.gather_tokens": ours, "torch gather": torch_gather}

    return Case(
        "topk",
        "gather",
        (batch, tokens, kept),
        "float32",
        build,
        bytes_moved=2 * batch * kept * 3 * 768 * 4,
        ceiling="copy",
        examine=agreement(0),
    )


def sample_case(rows: int, columns: int, samples: int, device: str) -> Case:
    def build() -> dict[str, Callable]:
        x = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)

        def nearest() -> Tensor:
            ordered, order = x.sort(-1)
            sums = ordered.cumsum(-1)
            low, high = sums[:, :1], sums[:, -1:]
            sums = (sums - low) / (high - low)
            first = sums[:, 1:2]
            step = (1 - first) / (samples - 1)
            points = first + step * torch.arange(samples, device=device)
            place = (points[..., None] - sums[:, None]).abs().argmin(-1)
            repeated = place.diff(dim=-1, prepend=place.new_full((rows, 1), -1)) == 0
            chosen = order.gather(1, place).masked_fill(repeated, -1)
            return chosen.gather(1, repeated.int().argsort(dim=-1, stable=True))

        ours = partial(tokred.inverse_transform_sample, x, samples)
        return {"tokred.inverse_transform_sample": ours, "torch, all distances": nearest}

    return Case(
        "topk",
        "sample",
        (rows, columns, samples),
        "float32",
        build,
        "uniform",
        4 * rows * (columns + samples),
        ceiling="read",
    )


def evict_case(batch: int, heads: int, keys: int, device: str) -> Case:
    """Three query heads a key head, of 64 channels in float32; half of the keys are recent."""

    def build() -> dict[str, Callable]:
        generator = torch.Generator().manual_seed(0)
        k, v = torch.randn(2, batch, heads, keys, 64, generator=generator).to(device)
        scores = torch.rand(batch, heads, keys, generator=generator).to(device)
        logits = torch.randn(batch, 3 * heads, keys, generator=generator).to(device)
        lse = logits.logsumexp(-1)
        position = torch.arange(keys, dtype=torch.int32, device=device)
        position = position.expand(batch, heads, keys).contiguous()
        new = torch.randn(batch, heads, 1, 64, generator=generator).to(device)
        recent = keys // 2

        def ours() -> Tensor:
            slot, _ = tokred.eviction_slot(position, keys, scores, logits, lse, recent=recent)
            tokred.replace_token(slot, k, new, v, new, position, keys)
            return slot

        def small_ops() -> Tensor:
            received = (logits - lse[..., None]).exp().unflatten(1, (heads, 3)).mean(2)
            total = (scores + received).masked_fill(position >= keys - recent, torch.inf)
            slot = total.argmin(2, keepdim=True)
            for old in (k, v):
                old.scatter_(2, slot[..., None].expand_as(new), new)
            position.scatter_(2, slot, keys)
            return slot

        return {"tokred.eviction_slot, replace_token": ours, "torch argmin, scatter": small_ops}

    return Case(
        "topk",
        "evict",
        (batch, heads, keys),
        "float32",
        build,
        "randn",
        4 * batch * heads * keys * 5,
        ceiling="read",
    )


def cases(run: Run) -> Iterator[Case]:
    for shape, k in SORTED:
        yield topk_case(shape, k, "float32", run.device, True)
    yield topk_case(*SORTED[0], "bfloat16", run.device, True)
    for shape, k in UNSORTED:
        yield topk_case(shape, k, "float32", run.device, False)
    yield compact_case((8, 131072), run.device)
    yield gather_case(64, 577, 288, run.device)
    yield sample_case(64, 577, 196, run.device)
    yield evict_case(1, 3, 1025, run.device)
    yield evict_case(8, 8, 1025, run.device)
    if run.quick:
        return
    for distribution in DISTRIBUTIONS:
        for shape, k in SORTED:
            yield topk_case(shape, k, "float16", run.device, True, distribution)
            yield topk_case(shape, k, "float32", run.device, False, distribution)
