"""The plain torch oracle, which remembers its latest results: all backends of a case share them."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

import tokred

ENTRIES = 24  # a case asks for up to four results, and its backends run one after another
_latest: OrderedDict[Hashable, Any] = OrderedDict()


class _NoKey(Exception):
    """A value that results cannot be remembered by."""


def _key(value: Any) -> Hashable:
    """What is equal for equal values: the contents of tensors, and the values of all else."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.requires_grad or value.device.type != "cpu":
            raise _NoKey
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return value.dtype, value.shape, hashlib.blake2b(data, digest_size=16).digest()
    if isinstance(value, tuple | list):
        return type(value), *(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in sorted(value.items()))
    if is_dataclass(value):
        return type(value), *(_key(getattr(value, field.name)) for field in fields(value))
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), value
    raise _NoKey


def _copy(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.clone()
    if type(result) is tuple:
        return tuple(_copy(part) for part in result)
    return copy.deepcopy(result)


def remember(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which must be pure: after a call with equal arguments, a copy of its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            key = (function, _key((args, kwargs)))
        except _NoKey:
            return function(*args, **kwargs)
        if key not in _latest:
            result = function(*args, **kwargs)
            if result is None:  # it has written to its arguments
                return None
            _latest[key] = result
            if len(_latest) > ENTRIES:
                _latest.popitem(last=False)
        _latest.move_to_end(key)
        return _copy(_latest[key])

    return call


class _Oracle:
    def __getattr__(self, op: str) -> Callable[..., Any]:
        return remember(getattr(tokred.reference, op))


reference = _Oracle()
