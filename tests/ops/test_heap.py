"""Calls leave nothing on the heap: thousands of calls of every op, valid ones and refused ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cases.heap_use import KNOWN, used
from cases.op_calls import CALLS, Sizes, call, op_names

CALLS_EACH = 300
SMALLEST = 8_000  # bytes; so many calls that leave an object each leave more

pytestmark = pytest.mark.skipif(not KNOWN, reason="needs mallinfo2 of glibc 2.33")


def growth(function: Callable[[], Any], calls: int) -> int:
    """The bytes that so many calls leave on the heap.

    Other threads of the process have a part in a measurement, but not in three one after another.
    """
    function()
    for _ in range(3):
        before = used()
        for _ in range(calls):
            function()
        grown = used() - before
        if grown < SMALLEST:
            break
    return grown


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def test_growth_is_seen() -> None:
    kept = []
    assert growth(lambda: kept.append(torch.ones(8)), CALLS_EACH) > SMALLEST


def test_every_op_is_called() -> None:
    assert op_names() == sorted(CALLS)


@pytest.mark.parametrize("op", sorted(CALLS))
def test_calls_leave_nothing(op: str) -> None:
    args = CALLS[op](Sizes())
    assert growth(lambda: call(torch.ops.tokred, op, args), CALLS_EACH) < SMALLEST


@pytest.mark.parametrize("op", sorted(CALLS))
def test_refused_calls_leave_nothing(op: str) -> None:
    args = CALLS[op](Sizes())

    def refused(value: Any) -> Any:
        if isinstance(value, str):
            return "a choice that no argument knows, and too long for a string to keep inside"
        return value.long() if isinstance(value, torch.Tensor) else value

    args = tuple(refused(arg) for arg in args)

    def once() -> None:
        with pytest.raises(RuntimeError, match=r"^tokred: "):
            call(torch.ops.tokred, op, args)

    assert growth(once, CALLS_EACH) < SMALLEST
