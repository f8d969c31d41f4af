"""Cases of forest_roots and forest_merge."""

from __future__ import annotations

from typing import Any

import torch
from case import Case, op_case
from compare import Mismatch
from draw import Draw
from torch import Tensor


def _forest(draw: Draw, batch: int, n: int) -> Tensor:
    """Trees of tokens in any order."""
    generator = draw.generator()
    order = torch.rand(batch, n, generator=generator).argsort(-1)
    deep = draw.choice([1.0, 1.0, 0.1])  # near 0: long chains
    rank = torch.arange(n)
    above = (rank - 1 - (torch.rand(batch, n, generator=generator) * deep * rank).long()).clamp_min(
        0
    )
    parent = order.gather(1, above)
    is_root = torch.rand(batch, n, generator=generator) < draw.choice([0.0, 0.2, 0.9])
    is_root[:, :1] = True
    parent = parent.masked_fill(is_root, draw.choice([-1, -7, n, n + 5]))
    return torch.empty_like(order).scatter_(1, order, parent).int()


@op_case
def forest_roots(draw: Draw) -> Case:
    batch, n = draw.batch(), draw.size()
    parent = _forest(draw, batch, n)

    def check(out: Any) -> None:
        root, children = out
        for b, row in enumerate(parent.tolist()):
            for i in range(n):
                at = i
                while 0 <= row[at] < n:
                    at = row[at]
                if root[b, i] != at or children[b, i] != row.count(i):
                    raise Mismatch(f"item {b}, token {i}: {root[b, i]}, {children[b, i]}")

    return Case("forest_roots", {"parent": parent}, check=check, batched=("parent",),
                loose=("parent",))  # fmt: skip


@op_case
def forest_merge(draw: Draw) -> Case:
    batch, n, channels = draw.batch(), draw.size(), draw.size()
    x = draw.floats((batch, n, channels), draw.dtype(), plain=True)
    some = {"x": x, "parent": _forest(draw, batch, n)}

    def check(out: Any) -> None:
        y, size, root = out
        wide = x.double()
        for b in range(batch):
            for r in set(root[b].tolist()):
                tree = root[b] == r
                mean = wide[b, tree].mean(0)
                if size[b, r] != tree.sum() or not torch.allclose(
                    y[b, r].double(), mean, rtol=1e-2, atol=2e-2
                ):
                    raise Mismatch(f"item {b}, tree {r} is not the mean of its tokens")
        if size.sum() != batch * n:
            raise Mismatch("tokens are missing")

    return Case("forest_merge", some, check=check, batched=("x", "parent"), loose=("parent",))
