"""Published token-reduction methods, one a file, each a few lines over the ops.

A method is what its file's METHOD says, and its name is that of the file: a new file is a new
method. Files whose names begin with _ hold what methods share.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any

from ._method import Family, Method, Needs, Options, written

__all__ = ["METHODS", "Family", "Method", "Needs", "Options", "get", "names", "written"]

METHODS: dict[str, Method]
"""All methods by name, by family and then by age; asking for it imports them all."""


def names() -> list[str]:
    """The names of all methods, sorted; none is imported."""
    return list(_names_in(tuple(__path__)))


def get(name: str) -> Method:
    """The method of that name; no other is imported.

    Raises:
        ValueError: there is none; the message has the nearest names, and all there are.
        TypeError: its file has no METHOD.
    """
    if name not in (known := names()):
        near = [repr(each) for each in get_close_matches(str(name), known, cutoff=0.7)]
        meant = f", did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"unknown method {name!r}{meant or ';'} the methods are {', '.join(known)}"
        )
    module = import_module(f"{__name__}.{name}")
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise TypeError(f"{module.__file__} must define METHOD = tokred.methods.Method(...)")
    return replace(method, name=name)


@cache
def _names_in(folders: tuple[str, ...]) -> tuple[str, ...]:
    found = (module.name for module in pkgutil.iter_modules(folders))
    return tuple(sorted(name for name in found if not name.startswith("_")))


@cache
def _methods_in(folders: tuple[str, ...]) -> tuple[Method, ...]:
    families, found = list(Family), map(get, _names_in(folders))
    return tuple(sorted(found, key=lambda m: (families.index(m.family), m.arxiv, m.name)))


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        return {method.name: method for method in _methods_in(tuple(__path__))}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
