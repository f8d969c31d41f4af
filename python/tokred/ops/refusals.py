"""Errors of ops as ValueError and TypeError, and the second try with int64 indices as int32."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SCHEMA = re.compile(r"Expected a value of type '(.+?)' for argument '(\w+)' but .*type '(.+?)'")
_WIDE = re.compile(r"tokred: .* must be int32.*, got int64")
_TYPES = {"SymInt": "int", "number": "float"}
_LARGEST = 2**31 - 1


class ArgumentError(ValueError, RuntimeError):
    """An argument that does not fit; a RuntimeError too, as torch raises for its own ops."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of a type that the op does not take; a RuntimeError too, as above."""


def again(op: Any, args: Sequence[Any], error: Exception, run: Callable[..., Any]) -> Any:
    """Runs a call that failed once more with int64 indices as int32, or raises its error.

    Raises:
        ValueError, TypeError: what the op said, where it was about an argument.
    """
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if value is None and str(argument.type) == "Tensor":
            raise TypeError(f"{argument.name} must be a tensor, got None") from None
    message = str(error)
    if _WIDE.match(message):
        pairs = zip(op._schema.arguments, args, strict=False)
        narrow = [_narrow(argument, value) for argument, value in pairs]
        if any(a is not b for a, b in zip(narrow, args, strict=True)):
            return run(*narrow)
    if message.startswith("tokred: "):
        raise ArgumentError(message) from None
    if found := _SCHEMA.search(message):
        expected, name, got = found.groups()
        optional = re.fullmatch(r"Optional\[(.*)\]", expected)
        inner = optional.group(1) if optional else expected
        kind = _TYPES.get(inner, inner) + (" or None" if optional else "")
        raise ArgumentTypeError(f"tokred: {name} must be of type {kind}, got {got}") from None
    raise error


def _narrow(argument: Any, value: Any) -> Any:
    """int64 as int32; nothing that is written to.

    Raises:
        ValueError: on the CPU, a number beyond int32. On a device, where reading it would wait, it
            becomes one that is out of range for every op.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or argument.is_write:
        return value
    if value.device.type == "cpu" and value.numel() > 0:
        low, high = value.aminmax()
        if low < -_LARGEST - 1 or high > _LARGEST:
            raise ArgumentError(
                f"tokred: {argument.name} must fit into int32, got int64 from {low} to {high}"
            )
    return value.clamp(-1, _LARGEST).to(torch.int32)
