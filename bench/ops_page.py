"""The ops for README.md and docs/ops.md, from the wrappers in tokred.ops and their docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import tokred

FAMILIES = (
    "score",
    "topk",
    "match",
    "cluster",
    "merge",
    "kv_pack",
    "sparse_attn",
    "packed_attn",
    "linear_attn",
)


def by_family() -> Iterator[tuple[str, list[str]]]:
    """The functions that every family makes public."""
    for family in FAMILIES:
        names = import_module(f"tokred.ops.{family}").__all__
        yield family, [name for name in names if inspect.isfunction(getattr(tokred, name))]


def summary(name: str) -> str:
    """The first paragraph of an op's docstring, for a cell of a table."""
    paragraph = (inspect.getdoc(getattr(tokred, name)) or "").partition("\n\n")[0]
    return paragraph.replace("\n", " ").replace("|", "\\|")


def overview() -> str:
    """One row a family."""
    rows = (f"| {family} | {', '.join(f'`{n}`' for n in names)} |" for family, names in by_family())
    return "\n".join(["| family | ops |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """One row an op."""
    rows = (
        f"| {family} | `{name}` | {summary(name)} |"
        for family, names in by_family()
        for name in names
    )
    return "\n".join(["| family | op | what it does |", "|---|---|---|", *rows]) + "\n"
