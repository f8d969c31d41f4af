"""A pytest plugin: the op tests' cases of the backend that TOKRED_BACKEND names, and no others."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

BACKEND = os.environ.get("TOKRED_BACKEND", "cuda")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the files without such cases, which may need packages that are not there."""
    if not collection_path.name.startswith("test_") or collection_path.is_dir():
        return None
    return None if re.search(r": Backend\b", collection_path.read_text()) else True


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leaves out the other backends before their cases are made, which would take minutes."""
    for fixtures in metafunc._arg2fixturedefs.values():
        for fixture in fixtures:
            if BACKEND in (fixture.params or ()):
                fixture.params = (BACKEND,)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if BACKEND not in item.name]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if BACKEND in item.name]
