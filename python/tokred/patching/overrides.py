"""What a patch changes in a model, and how it is taken back."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

_ABSENT = object()  # the instance had no such attribute of its own
_numbers = itertools.count()
_lock = threading.RLock()
_active: weakref.WeakSet[Overrides] = weakref.WeakSet()  # those that have set something


@dataclass
class _Entry:
    """One attribute of an instance: its value before, and the value it was set to."""

    instance: Any
    name: str
    previous: Any
    value: Any

    def current(self) -> Any:
        return vars(self.instance).get(self.name, _ABSENT)

    def restore(self) -> None:
        if self.previous is not _ABSENT:
            setattr(self.instance, self.name, self.previous)
        elif self.name in vars(self.instance):
            delattr(self.instance, self.name)

    def __str__(self) -> str:
        return f"{type(self.instance).__name__}.{self.name}"


class Overrides:
    """Attributes set on instances, and hooks, all of which undo() takes back, in any order."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._entries: list[_Entry] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def replace(self, module: nn.Module, name: str, function: Callable, *args: Any) -> None:
        """Makes module.name(...) call function(*args, original, ...)."""
        current = getattr(module, name)
        original = getattr(current, "tokred_original", current)
        replacement: Any = partial(function, *args, original)
        replacement.tokred_original = original
        replacement.__wrapped__ = original  # what inspect.signature shows
        self.assign(module, name, replacement)

    def assign(self, instance: Any, name: str, value: Any) -> None:
        """Sets an attribute of an instance, such as a config."""
        with _lock:
            if not self._entries:
                self._number = next(_numbers)
                _active.add(self)
            self._entries.append(_Entry(instance, name, vars(instance).get(name, _ABSENT), value))
            setattr(instance, name, value)

    def pre_hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Calls function(module, args, kwargs) before each of module's forward passes."""
        self._hooks.append(module.register_forward_pre_hook(function, with_kwargs=True))

    def hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Calls function(module, args, output) after each of module's forward passes."""
        self._hooks.append(module.register_forward_hook(function))

    def undo(self, failure: BaseException | None = None) -> None:
        """Restores everything. What other code changed meanwhile is lost, with a warning.

        Where a later patch has set the same attribute, its value stays, and that patch will restore
        what this one found.

        Args:
            failure: the exception in flight, which gets a note instead of the warning.
        """
        with _lock:
            changed = [str(e) for e in reversed(self._entries) if not self._restored_ours(e)]
            self._entries.clear()
            _active.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not changed:
            return
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        message = (
            f"{changed[0]}{others} changed while tokred.patch was in place, and is now what it was "
            "before the patch: make such changes before entering a patch, or after leaving it"
        )
        if failure is None:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        elif hasattr(failure, "add_note"):
            failure.add_note(message)

    def _restored_ours(self, entry: _Entry) -> bool:
        """Restores one attribute; False where that loses a change made by other code."""
        later = [
            (overrides._number, other)
            for overrides in _active
            if overrides._number > self._number
            for other in overrides._entries
            if other.instance is entry.instance and other.name == entry.name
        ]
        if later:
            following = min(later, key=lambda pair: pair[0])[1]
            ours, following.previous = following.previous is entry.value, entry.previous
            return ours
        current = entry.current()
        entry.restore()
        return current is entry.value or current is entry.previous
