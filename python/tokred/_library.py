"""Loads the op libraries, and calls their ops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

# The variable points the tests at builds with sanitizers.
LIBRARY_FOLDER = Path(os.environ.get("TOKRED_LIBRARY_FOLDER", Path(__file__).parent / "lib"))


def library_paths() -> list[Path]:
    """The libraries to load: the CPU one always, the CUDA one beside a CUDA build of torch."""
    paths = [LIBRARY_FOLDER / "libtokred.so"]
    cuda = LIBRARY_FOLDER / "libtokred_cuda.so"
    if torch.version.cuda is not None and cuda.exists():
        paths.append(cuda)
    return paths


def load() -> None:
    """Registers torch.ops.tokred.* with torch.

    Raises:
        ImportError: a library is missing or does not fit this torch.
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


def call(op: Any, *args: Any) -> Any:
    """op(*args), stepping over the autograd layer (several us a call) where nothing is recorded."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op(*args)
    if torch.is_inference_mode_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor without its history, for ops that have no gradient."""
    return tensor.detach() if tensor is not None and tensor.requires_grad else tensor


def refuse_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuses inputs whose gradient an inference-only op would drop.

    Raises:
        ValueError: naming the argument that requires grad while gradients are recorded.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op} has no gradient, but {name} requires grad: detach it, or call {op} under "
                "torch.no_grad()"
            )
