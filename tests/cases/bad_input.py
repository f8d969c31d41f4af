"""The test of bad input: every error names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import pytest


def names_the_argument(cases: list[tuple[Callable, tuple, dict, str]]) -> Callable:
    """A test of calls that are refused: function, args, kwargs, what the message says."""
    ids = [f"{function.__name__}: {message}" for function, _, _, message in cases]

    @pytest.mark.parametrize(("function", "args", "kwargs", "message"), cases, ids=ids)
    def test(function: Callable, args: tuple, kwargs: dict, message: str) -> None:
        # An op that has no wrapper, as those of gradients, raises what torch's own raise.
        wrapped = isinstance(function, FunctionType)
        with pytest.raises((ValueError, TypeError) if wrapped else RuntimeError, match=message):
            function(*args, **kwargs)

    return test
