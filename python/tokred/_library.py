"""Loads the op libraries; has the checks of tensors that wrappers, caches and patches share."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The variable points the tests at builds with sanitizers.
LIBRARY_FOLDER = Path(os.environ.get("TOKRED_LIBRARY_FOLDER", Path(__file__).parent / "lib"))
CUDA_LIBRARY = "libtokred_cuda.so"


def library_paths() -> list[Path]:
    """The libraries to load: the CPU one always, the CUDA one beside a CUDA build of torch."""
    paths = [LIBRARY_FOLDER / "libtokred.so"]
    cuda = LIBRARY_FOLDER / CUDA_LIBRARY
    if torch.version.cuda is not None and cuda.exists():
        paths.append(cuda)
    return paths


def load() -> None:
    """Registers torch.ops.tokred.* with torch.

    Raises:
        ImportError: a library is missing or does not fit this torch.

    Warns where a GPU's driver is older than the CUDA that the library was built with.
    """
    for path in library_paths():
        if not path.exists():
            raise ImportError(
                f"tokred's op library {path} is missing: run `make build` in the checkout, or "
                "`pip install .`, with this Python"
            )
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise ImportError(
                f"tokred's op library {path} does not load under torch {torch.__version__} "
                "(2.11 or newer is needed): run `make build` or `pip install .` again"
            ) from error
        if path.name == CUDA_LIBRARY and (problem := driver_problem(*_cuda_versions(path))):
            warnings.warn(problem, RuntimeWarning, stacklevel=3)


def _cuda_versions(library: Path) -> tuple[int, int]:
    """CUDA versions: that of the driver, 0 without one, and that of the library's build."""
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(library)).tokred_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why CUDA ops cannot run; versions are 1000 * major + 10 * minor.

    A driver runs what was built with a newer CUDA of the same major version.
    """
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    supports, built = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, runtime))
    return (
        f"tokred's CUDA ops were built with CUDA {built} and cannot run, as this machine's driver "
        f"supports CUDA {supports} only: update the driver, or build tokred with CUDA "
        f"{driver // 1000}.x"
    )


def check_tensor(name: str, value: Any) -> None:
    """Raises a TypeError unless it is a tensor; for functions that read it before the op does."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def refuse_grad(called: str, **tensors: Tensor | None) -> None:
    """Refuses inputs whose gradient a function would drop.

    Raises:
        ValueError: naming the argument that requires grad while gradients are recorded.
    """
    if torch.is_grad_enabled():
        refuse_history(called, list(tensors), tensors.values())


def refuse_history(
    called: str, names: Sequence[str], values: Iterable[Any], besides: Sequence[str] = ()
) -> None:
    """Refuses values that require grad, whether or not gradients are recorded here.

    Raises:
        ValueError: naming the argument.
    """
    for name, tensor in named_tensors(names, values):
        if tensor.requires_grad and name not in besides:
            has = f"gradients in {', '.join(besides)} alone" if besides else "no gradient"
            raise ValueError(
                f"{called} has {has}, but {name} requires grad: detach it, or use torch.no_grad()"
            )


def named_tensors(names: Sequence[str], values: Iterable[Any]) -> Iterable[tuple[str, Tensor]]:
    """The tensors among an op's arguments, and those in its lists, with their names."""
    for name, value in zip(names, values, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list | tuple):
            items = [f"{name}[{i}]" for i in range(len(value))]
            yield from named_tensors(items, value)


def tensors_in(value: Any) -> list[Tensor]:
    """A value's tensors, those in its tuples, lists and dicts included."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return []
    return [tensor for part in parts for tensor in tensors_in(part)]
