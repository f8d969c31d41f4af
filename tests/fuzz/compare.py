"""When results are the same bits, and when they are as precise as they should be."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mismatch(Exception):
    """A result that is not what it must be."""


def flat(value: Any) -> list[Tensor]:
    """The tensors in a result or an argument."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    return [t for part in value for t in flat(part)] if isinstance(value, list | tuple) else []


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _first(places: Tensor) -> tuple[int, ...]:
    return tuple(places.nonzero()[0].tolist())


def same(actual: Any, expected: Any, context: str) -> None:
    """Raises unless all bits are equal; which NaN it is does not matter."""
    pairs = list(zip(flat(actual), flat(expected), strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"{context}: result {number} is {_kind(a)}, not {_kind(b)}")
        if not a.numel():
            continue
        if a.is_complex():
            a, b = torch.view_as_real(a.contiguous()), torch.view_as_real(b.contiguous())
        different = bits(a) != bits(b)
        if a.is_floating_point():
            different &= ~(a.isnan() & b.isnan())
        if different.any():
            at, count = _first(different), int(different.sum())
            raise Mismatch(
                f"{context}: result {number} differs at {count} of {a.numel()} places, first at "
                f"{at}: {a[at].item()!r} is not {b[at].item()!r}"
            )


def near(
    actual: Any, exact: Any, single: Any, slack: float, context: str, where: Any = None
) -> None:
    """Raises unless the results are as precise as plain torch at the same precision.

    exact is in float64, single in the precision of the op's sums: four times its error is allowed,
    the rounding to the dtype of the result, and slack * (1 + the largest number). Integers must be
    equal, and so must be what is not finite. where: bool masks of what to look at.
    """
    masks = [None] * len(flat(actual)) if where is None else flat(where)
    results = zip(flat(actual), flat(exact), flat(single), masks, strict=True)
    for number, (a, e, s, mask) in enumerate(results):
        what = f"{context}: result {number}"
        if a.shape != e.shape:
            raise Mismatch(f"{what} is {_kind(a)}, not {_kind(e)}")
        if not a.numel():
            continue
        if not a.is_floating_point():
            wrong = a.long() != e.long()
            wrong = wrong if mask is None else wrong & mask.expand_as(a)
            if wrong.any():
                at = _first(wrong)
                raise Mismatch(f"{what} at {at}: {a[at].item()} is not {e[at].item()}")
            continue
        _near_floats(a, e.double(), s.double(), slack, what, mask)


def _near_floats(
    a: Tensor, e: Tensor, s: Tensor, slack: float, what: str, mask: Tensor | None
) -> None:
    limits = torch.finfo(a.dtype)
    looked = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.expand_as(a)
    looked = looked & ~(e.isfinite() & (e.abs() > limits.max / 2))
    a = a.double()
    infinite = looked & ~e.isfinite()
    wrong = infinite & ~torch.where(e.isnan(), a.isnan(), a == e)
    if wrong.any():
        at = _first(wrong)
        raise Mismatch(f"{what} at {at}: {a[at].item()} is not {e[at].item()}")
    looked = looked & e.isfinite()
    if not looked.any():
        return
    error_of_single = (s - e)[looked].abs().nan_to_num(0, 0, 0).max()
    largest = e[looked].abs().max()
    rounding = 1.01 * limits.eps * e.abs() + limits.tiny
    allowed = 4 * error_of_single + slack * (1 + largest) + rounding
    wrong = looked & ~((a - e).abs() <= allowed)
    if wrong.any():
        at = _first(wrong)
        raise Mismatch(
            f"{what} at {at}: {a[at].item()} is not {e[at].item()} within {allowed[at].item():.3g} "
            f"({int(wrong.sum())} places)"
        )
