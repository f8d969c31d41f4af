"""Checks of sizes for fake kernels and wrappers; a size may be known only when a graph runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes certainly holds; False where only running the graph will tell.

    Without a graph it is the condition itself. Inside one, code that depends on the answer must be
    right for all sizes, or the op must refuse the call when it runs.
    """
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        return torch.fx.experimental.symbolic_shapes.guard_or_false(condition)
    return condition


def larger(a: int | torch.SymInt, b: int | torch.SymInt) -> Any:
    """torch.sym_max, which the Dynamo of torch 2.11 does not trace for plain integers."""
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)


def smaller(a: int | torch.SymInt, b: int | torch.SymInt) -> Any:
    """torch.sym_min; see `larger`."""
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)


def check_dim(name: str, tensor: Tensor, dims: int, layout: str) -> None:
    """Refuses another number of dimensions, as the kernels do."""
    if tensor.dim() != dims:
        shape = list(tensor.shape)
        raise RuntimeError(f"{name} must have {dims} dimensions {layout}, got shape {shape}")


def check_writable(name: str, tensor: Tensor) -> None:
    """Refuses to write to an expanded tensor; the kernels refuse other overlaps as they run."""
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        torch._check(
            not (known(stride == 0) and known(size > 1)),
            lambda: (
                f"{name} must not overlap itself, got strides {tensor.stride()} for shape "
                f"{list(tensor.shape)}"
            ),
        )
