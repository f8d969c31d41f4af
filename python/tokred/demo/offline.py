"""What loading a real model from PyPI packages, without a model hub, takes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = {
    "transformers": "transformers",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
    "rich": "rich",
}


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


def default_cache() -> Path:
    """Where converted weights are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokred"


def require_packages() -> None:
    """Raises MissingModelError where a package that the demo needs is not installed."""
    missing = [package for module, package in NEEDED.items() if not _installed(module)]
    if missing:
        raise MissingModelError(
            f"the demo needs {', '.join(missing)}: run `pip install {' '.join(missing)}`"
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
