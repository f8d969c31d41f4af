"""The former name of `tokred.integrations`, for one more release: it works, and warns."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

_MOVED = {
    "attention": "tokred.integrations.transformers.attention",
    "diffusers": "tokred.integrations.diffusers",
    "packed": "tokred.integrations.transformers.packed_states",
    "timm": "tokred.integrations.timm",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"tokred.models.{name} is now {_MOVED[name]}", DeprecationWarning, stacklevel=2)
    return importlib.import_module(_MOVED[name])
