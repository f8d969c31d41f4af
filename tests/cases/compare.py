"""How results are compared: bit by bit, or by the error that their precision allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def assert_bitwise_equal(actual: Any, expected: Any, context: str = "") -> None:
    """Equal bits, NaN included; the message names the first element that differs."""
    for number, (a, b) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"{context}: result {number}"
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        different = (a.contiguous().view(width) != b.contiguous().view(width)).nonzero()
        if len(different):
            where = tuple(different[0].tolist())
            pytest.fail(
                f"{context}: result {number} differs at {len(different)} places, first at {where}: "
                f"{a[where].item()!r} is not {b[where].item()!r}"
            )


def assert_one_result(results: dict[str, Any]) -> None:
    """All of them have the bits of the first."""
    first, *others = results.items()
    for name, result in others:
        assert_bitwise_equal(result, first[1], f"{name} against {first[0]}")


def assert_as_accurate(
    actual: Tensor, exact: Tensor, same_precision: Tensor, slack: float, context: str = ""
) -> None:
    """At most twice the error of a plain torch computation at the same precision, plus slack.

    `exact` is in float64; where it is not finite, actual must be the same.
    """
    actual, same_precision = actual.double(), same_precision.double()
    finite = exact.isfinite()
    same = torch.where(exact.isnan(), actual.isnan(), actual == exact)
    assert same[~finite].all(), f"{context}: not finite in different places"
    error = (actual - exact)[finite].abs()
    allowed = 2 * (same_precision - exact)[finite].abs().nan_to_num(0)
    limit = (allowed.max() if allowed.numel() else 0) + slack
    assert (error <= limit).all(), f"{context}: error {error.max():.3g}, allowed {limit:.3g}"
