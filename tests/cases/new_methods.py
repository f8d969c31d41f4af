"""Files of methods in other folders than the package's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokred import methods


@contextmanager
def methods_in(folder: Path) -> Iterator[None]:
    """Inside, the files of the folder are methods too, as if they lay beside the others."""
    path = methods.__path__
    methods.__path__ = [*path, str(folder)]
    try:
        yield
    finally:
        methods.__path__ = path
        for file in folder.glob("*.py"):
            if sys.modules.pop(f"{methods.__name__}.{file.stem}", None):
                delattr(methods, file.stem)
