"""What the tests of scores share: which cases there are, how accurate and how alike results are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cases.backends import Backend
from cases.compare import assert_as_accurate, assert_bitwise_equal, flat
from cases.inputs import FLOATS, label
from cases.packed import alone

REDUCTIONS = ("none", "group_mean", "group_max", "head_mean", "softmax_vote")
EPS = torch.finfo(torch.float32).eps


def grid(cases: list, field: str, values: tuple[str, ...]) -> list:
    """Every case with every value of a field, the dtypes taking turns."""
    return [
        replace(case, **{field: value, "dtype": FLOATS[(i + j) % 3]})
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]


def check_accuracy(
    actual: Tensor, exact: Tensor, plain: Tensor, logits: Tensor, slack: float = 0.0
) -> None:
    """As accurate as plain torch, up to slack and a few units in the last place of the logits."""
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    assert_as_accurate(actual, exact, plain, 8 * EPS * (1 + largest(logits)) + slack)


def largest(x: Tensor) -> float:
    """The largest finite magnitude."""
    x = x[x.isfinite()].abs()
    return x.max().item() if len(x) else 0.0


def case_label(value: Any) -> str:
    """The part of a test id that an op, or a case, is."""
    return value if isinstance(value, str) else label(value)


def assert_alone_as_in_a_batch(kernels: Backend, op: str, inputs: tuple) -> None:
    """Every item of a batch of three as in the batch, bit for bit."""
    whole = flat(kernels.run(op, *inputs))
    for number in range(3):
        one = slice(number, number + 1)
        part = kernels.run(op, *(alone(t, one, 3) for t in inputs))
        assert_bitwise_equal(part, [t[one] for t in whole], f"item {number}")
