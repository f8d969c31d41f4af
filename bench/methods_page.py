"""The methods for README.md and docs/methods.md, from the METHOD of each file in tokred.methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import groupby
from types import ModuleType
from typing import Any

from tokred import methods
from tokred.methods import Family, Method, Options, written

EMPTY = inspect.Parameter.empty


def by_family() -> Iterator[tuple[Family, list[Method]]]:
    for family, listed in groupby(methods.METHODS.values(), key=lambda method: method.family):
        yield family, list(listed)


def overview() -> str:
    """One line a family, with links to docs/methods.md."""
    lines = []
    for family, listed in by_family():
        names = ", ".join(f"[`{m.name}`](docs/methods.md#{m.name})" for m in listed)
        lines.append(f"- {family.value}: {names}\n")
    return "".join(lines)


def page() -> str:
    """A section a family, in it one a method."""
    return "".join(
        f"## {sentence(family.value)}\n\n{''.join(map(section, listed))}"
        for family, listed in by_family()
    )


def sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def section(method: Method) -> str:
    """What a method is, and how it is called."""
    paper = f"[{method.title}](https://arxiv.org/abs/{method.arxiv})"
    calls = [method.usage()] if method.options else []
    calls += [f"{name}{signature(each)}" for name, each in public(method.load())]
    return (
        f"### {method.name}\n\n"
        f"{paper}, arXiv {method.arxiv}, {method.year}. Needs {method.needs_in_words}; "
        f"{method.status}.\n\n"
        f"{sentence(method.summary)}.\n\n"
        "```text\n" + "\n".join(calls) + "\n```\n\n"
    )


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes of a module, in its order, without those tokred.patch makes."""
    for name, each in vars(module).items():
        mine = getattr(each, "__module__", None) == module.__name__
        if name.startswith("_") or not mine or not callable(each):
            continue
        parameters = [*inspect.signature(each).parameters]
        made_by_patch = isinstance(each, type) and parameters == ["options"]
        if not made_by_patch and not (isinstance(each, type) and issubclass(each, Options)):
            yield name, each


def signature(each: Any) -> str:
    """The parameters with their defaults, without types."""
    parts = []
    for parameter in inspect.signature(each).parameters.values():
        default = parameter.default
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        name = stars.get(parameter.kind, "") + parameter.name
        parts.append(name if default is EMPTY else f"{name}={written(default)}")
    return f"({', '.join(parts)})"
