"""Attributes replaced on instances, and how they are put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


class Overrides:
    """Attributes set on instances, and hooks, all of which undo() takes back."""

    def __init__(self) -> None:
        self._assigned: list[tuple[Any, str, Any, Any]] = []
        self._replaced: list[tuple[nn.Module, str, Any, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def replace(self, module: nn.Module, name: str, function: Callable, *args: Any) -> None:
        """Makes module.name(...) call function(*args, original, ...)."""
        previous = getattr(module, name)
        original = getattr(previous, "tokred_original", previous)
        replacement = partial(function, *args, original)
        replacement.tokred_original = original
        self._replaced.append((module, name, module.__dict__.get(name), replacement))
        setattr(module, name, replacement)

    def assign(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of anything, such as a config."""
        self._assigned.append((owner, name, getattr(owner, name), value))
        setattr(owner, name, value)

    def hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Calls function(module, args, output) after each of module's forward passes."""
        self._hooks.append(module.register_forward_hook(function))

    def undo(self) -> None:
        """Restores everything.

        Raises:
            RuntimeError: something was replaced again since; nothing is restored then.
        """
        for module, name, _, replacement in self._replaced:
            if module.__dict__.get(name) is not replacement:
                raise RuntimeError(
                    f"{type(module).__name__}.{name} was replaced after this patch was applied: "
                    "leave nested patches in the reverse order of entering them"
                )
        for owner, name, _, value in self._assigned:
            if getattr(owner, name) != value:
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} was changed inside the patch, from {value!r} "
                    f"to {getattr(owner, name)!r}: change it back before leaving"
                )
        for owner, name, previous, _ in reversed(self._assigned):
            setattr(owner, name, previous)
        for module, name, previous, _ in reversed(self._replaced):
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        for hook in self._hooks:
            hook.remove()
        self._assigned.clear()
        self._replaced.clear()
        self._hooks.clear()
