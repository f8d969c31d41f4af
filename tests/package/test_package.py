"""The package: what comes with an import, and what it says without its library."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tokred
from tokred import _library


def test_import_is_light() -> None:
    """Only torch comes with the functional API; models are imported when they are patched."""
    code = (
        "import sys, torch; before = set(sys.modules); import tokred; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(*new & {'timm', 'transformers', 'torchvision', 'diffusers', 'numpy'}); "
        "lazy = ('tokred.methods', 'tokred.integrations'); "
        "print(*[name for name in sys.modules if name.startswith(lazy)])"
    )
    package_root = Path(tokred.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=package_root, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_missing_library_says_what_to_do(tmp_path, monkeypatch) -> None:
    from tokred import _library

    monkeypatch.setattr(_library, "LIBRARY_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="make build"):
        _library.load()
    (tmp_path / "libtokred.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load"):
        _library.load()


def test_everything_exported_exists() -> None:
    for name in set(tokred.__all__) - {"patch"}:
        assert callable(getattr(tokred, name)) and getattr(tokred, name).__doc__
    with pytest.raises(AttributeError, match="nothing_like_that"):
        tokred.nothing_like_that  # noqa: B018


def test_the_version_has_one_source() -> None:
    """python/tokred/_version.py: setuptools and CMake read it."""
    root = Path(__file__).resolve().parents[2]
    texts = {name: (root / name).read_text() for name in ("pyproject.toml", "CMakeLists.txt")}
    assert all("_version" in text and tokred.__version__ not in text for text in texts.values())
    assert importlib.import_module("tokred._C").build_info()["version"] == tokred.__version__


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(tokred.__file__).parent / "py.typed").exists()


def test_the_former_name_of_integrations_warns() -> None:
    from tokred.integrations.transformers import attention

    with pytest.warns(DeprecationWarning, match=r"tokred\.integrations\.transformers\.attention"):
        from tokred.models import attention as former
    assert former is attention
    with pytest.raises(ImportError, match="nothing"):
        from tokred.models import nothing  # noqa: F401


def test_a_driver_that_is_too_old_is_named() -> None:
    """A driver of an older major version: within one, drivers run what a newer CUDA built."""
    for driver, runtime in ((0, 13000), (13000, 13000), (13000, 13020), (14000, 13000)):
        assert _library.driver_problem(driver, runtime) is None
    assert _library.driver_problem(12040, 13000) == (
        "tokred's CUDA ops were built with CUDA 13.0 and cannot run, as this machine's driver "
        "supports CUDA 12.4 only: update the driver, or build tokred with CUDA 12.x"
    )
