"""A pytest plugin: runs one case in TOKRED_EVERY of those that use the avx512 kernels."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import pytest

BACKEND = "cpu-avx512"
EVERY = int(os.environ.get("TOKRED_EVERY", "1"))
OFFSET = int(os.environ.get("TOKRED_OFFSET", "0"))


def pytest_sessionstart() -> None:
    """Fails where every case would be skipped."""
    from tokred import _C

    if not _C.set_cpu_isa("avx512"):
        pytest.exit("this CPU has no AVX-512, or not all of it", returncode=1)


def pytest_report_header() -> str:
    """What the kernels may use, of that which they ask for."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return "cpu: " + " ".join(sorted(flag for flag in flags if flag.startswith("avx512")))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out the files without such cases, which may need packages that are not there."""
    if not collection_path.name.startswith("test_") or collection_path.is_dir():
        return None
    uses = re.search(r": Backend\b|\bon_every_cpu\b", collection_path.read_text())
    return None if uses else True


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leaves out the other backends before their cases are made, which would take minutes."""
    for fixtures in metafunc._arg2fixturedefs.values():
        for fixture in fixtures:
            if BACKEND in (fixture.params or ()):
                fixture.params = (BACKEND,)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses by a hash of the name, so that other cases do not matter."""

    def chosen(item: pytest.Item) -> bool:
        uses = BACKEND in item.nodeid or "on_every_cpu" in item.fixturenames
        return uses and zlib.crc32(item.nodeid.encode()) % EVERY == OFFSET

    config.hook.pytest_deselected(items=[item for item in items if not chosen(item)])
    items[:] = [item for item in items if chosen(item)]
