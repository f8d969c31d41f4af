"""The guarding allocator: compiled once, loaded before Python, steered from here."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

SOURCE = Path(__file__).with_name("guard.c")
LIBRARY = Path(__file__).parents[2] / "build" / "fuzz" / "guard.so"
_FILLS = (0x00, 0xFF, 0xCB, 0x7F, 0x80, 0x3C)


def loaded() -> bool:
    """Whether this process has the allocator."""
    return str(LIBRARY) in os.environ.get("LD_PRELOAD", "")


def environment() -> dict[str, str]:
    """The environment of a process with the allocator, which is compiled if it is not there."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        partial = LIBRARY.with_suffix(f".{os.getpid()}")
        options = ["-O2", "-fPIC", "-shared", str(SOURCE), "-o", str(partial), "-ldl"]
        subprocess.run([os.environ.get("CC", "cc"), *options], check=True)
        partial.replace(LIBRARY)
    return os.environ | {"LD_PRELOAD": str(LIBRARY)}


class Guard:
    """The allocator of this process; does nothing where it is not loaded."""

    def __init__(self) -> None:
        # Of the process itself: what LD_PRELOAD brought.
        self._library = ctypes.CDLL(None) if loaded() else mock.MagicMock()
        self._library.guard_fail_in.argtypes = [ctypes.c_long]

    @contextmanager
    def on(self, enabled: bool = True) -> Iterator[None]:
        """Guards the tensors that are made inside."""
        self._library.guard_enable(enabled)
        try:
            yield
        finally:
            self._library.guard_enable(not enabled)

    def vary(self, number: int) -> None:
        """Another content of fresh memory, and at times the other end of it closed."""
        self._library.guard_fill(_FILLS[number % len(_FILLS)])
        self._library.guard_at_start(number % 4 == 3)

    @contextmanager
    def failing(self, allocation: int) -> Iterator[None]:
        """The allocation of this number, from 0, fails inside."""
        self._library.guard_fail_in(allocation)
        try:
            yield
        finally:
            self._library.guard_fail_in(-1)
