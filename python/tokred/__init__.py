"""Token reduction kernels: scoring, choosing, matching, merging, packing, sparse attention.

The functional API below calls torch.ops.tokred.*, on CPU and CUDA tensors. The same ops in plain
torch are in tokred.reference, attention modules in tokred.nn, the published methods in
tokred.methods, and `tokred.patch`, or `tokred.apply`, puts a method into a timm, transformers or
diffusers model.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _library, compat
from ._version import __version__ as __version__

_library.load()

from .ops import *  # noqa: E402  (the ops must exist before their wrappers)
from .ops import __all__ as _ops  # noqa: E402

if TYPE_CHECKING:
    from .cache import DenseCache, PackedCache
    from .evaluation import benchmark, evaluate, profile
    from .patching import apply, patch

__all__ = ["DenseCache", "PackedCache", "apply", "benchmark", "evaluate", "patch", "profile", *_ops]

_LAZY_MODULES = (
    "cache", "distributed", "evaluation", "integrations", "methods", "models", "nn", "patching",
    "reference",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports what is not needed to run an op when it is first asked for."""
    if name in ("apply", "patch"):
        return getattr(importlib.import_module("tokred.patching"), name)
    if name in ("benchmark", "evaluate", "profile"):
        return getattr(_imported("evaluation"), name)
    if name in ("DenseCache", "PackedCache"):
        return getattr(_imported("cache"), name)
    if name in _LAZY_MODULES:
        return _imported(name)
    raise AttributeError(f"module 'tokred' has no attribute {name!r}")


def _imported(module: str) -> ModuleType:
    """A module of tokred.

    Raises:
        ImportError: it needs a package that is not installed, with what installs it.
    """
    try:
        return importlib.import_module(f"tokred.{module}")
    except ModuleNotFoundError as error:
        if advice := compat.advice(error):
            raise ImportError(f"tokred.{module}: {advice}") from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
