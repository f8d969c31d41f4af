"""A pytest plugin: keeps the cases that run the avx512 kernels, or every n-th of them."""

from __future__ import annotations

import os
import zlib

import pytest

ISA = os.environ.get("TOKRED_ONLY_ISA", "avx512")
EVERY = int(os.environ.get("TOKRED_EVERY", "1"))
OFFSET = int(os.environ.get("TOKRED_OFFSET", "0"))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leaves the other backends out before their cases are made, which takes a while."""
    for fixtures in metafunc._arg2fixturedefs.values():
        for fixture in fixtures:
            if f"cpu-{ISA}" in (fixture.params or ()):
                fixture.params = (f"cpu-{ISA}",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By a hash of its name, so that a case stays chosen whatever else there is."""

    def chosen(item: pytest.Item) -> bool:
        if f"cpu-{ISA}" not in item.nodeid and "on_every_cpu" not in item.fixturenames:
            return False
        return zlib.crc32(item.nodeid.encode()) % EVERY == OFFSET

    left_out = [item for item in items if not chosen(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if chosen(item)]
