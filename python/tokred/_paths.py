"""Checks of where a command writes, before it computes anything."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(option: str, path: Path) -> None:
    """Refuses a folder that cannot be made or written.

    Raises:
        ValueError: naming the option, and what is in the way.
    """
    path = path.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"{option} must be a folder, and {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{option} must be a folder to write into, and {there} is read-only")


def check_file(option: str, path: Path) -> None:
    """Refuses a file that cannot be written.

    Raises:
        ValueError: naming the option, and what is in the way.
    """
    if path.is_dir():
        raise ValueError(f"{option} must be a file, and {path} is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} must be a file to write, and {path} is read-only")
    check_folder(f"the folder of {option}", path.parent)
