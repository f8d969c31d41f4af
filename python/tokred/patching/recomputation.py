"""Finds the forward pass that a layer runs in: one per thread, or the one that is recomputed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tokred._library import tensors_in

T = TypeVar("T")


def backward_task() -> int:
    """The id of the backward pass that is running, or -1 outside of one."""
    if torch.compiler.is_compiling():
        return -1
    return torch._C._current_graph_task_id()


def refuse_late_backward(output: Any, module: nn.Module) -> None:
    """Lets gradients reach the output of a patched module only as long as that patch is in place.

    For modules with a reentrant checkpoint inside, which would recompute without the method: where
    shapes stay the same, the gradients would be wrong. Checkpoints that are not reentrant notice
    the difference themselves.

    Args:
        output: what the module's forward returned: tensors, tuples, lists and dicts of them.
    """
    if torch.compiler.is_compiling():
        return
    patched = vars(module).get("forward")

    def check(grad: torch.Tensor) -> None:
        if vars(module).get("forward") is not patched:
            raise RuntimeError(
                f"backward of {type(module).__name__} has checkpoints to recompute, and the patch "
                "they were made in was left, or another was entered: call backward() inside it"
            )

    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(check)


class PerThread(threading.local, Generic[T]):
    """An object for each thread, made when it first asks for its `own`.

    torch.compile keeps what it assigns to attributes of that object; what it assigned to those of a
    threading.local itself would be lost.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.own = make()


class StorageTable(Generic[T]):
    """Values found by the storage of a tensor, as long as that lives.

    torch.utils.checkpoint keeps the inputs of what it will recompute, as they are or detached: in
    both cases they share the storage of the tensors of the forward pass. Under torch.compile, which
    recomputes within its graph, nothing is kept.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, int], tuple[StorageWeakRef, T]] = {}

    def add(self, x: torch.Tensor, place: int, value: T) -> None:
        """Keeps the value for x at that place, such as the number of a layer."""
        if not torch.compiler.is_compiling():
            storage = StorageWeakRef(x.untyped_storage())
            self._values[storage.cdata, place] = storage, value

    def find(self, x: torch.Tensor, place: int) -> T | None:
        """The value kept for x's storage at that place."""
        if torch.compiler.is_compiling():
            return None
        key = StorageWeakRef(x.untyped_storage()).cdata, place
        reference, value = self._values.get(key, (None, None))
        return None if reference is None or reference.expired() else value

    def purge(self) -> None:
        """Forgets the storages that are gone."""
        if not torch.compiler.is_compiling():
            for key, (reference, _) in list(self._values.items()):
                if reference.expired():
                    self._values.pop(key, None)
