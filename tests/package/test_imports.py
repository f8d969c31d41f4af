"""Which Python room may import which, and that patching knows no integration until it patches."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokred

PACKAGE = Path(tokred.__file__).parent
ANYONE = {"_library", "_version", "compat"}
# Of each room, those it may import beside itself and those for ANYONE; all come before it here.
MAY_IMPORT: dict[str, set[str]] = {
    "_library": set(),
    "_version": set(),
    "compat": set(),
    "_paths": set(),
    "ops": set(),
    "reference": {"ops"},
    "distributed": {"ops"},
    "selection": {"ops"},
    "schedule": set(),
    "grid": set(),
    "nn": {"ops", "selection"},
    "methods": {"ops", "selection", "schedule", "grid"},
    "patching": {"ops", "methods"},
    "integrations": {"ops", "grid", "patching", "selection"},
    "models": set(),
    "cache": {"ops", "integrations"},
    "evaluation": {"ops", "methods", "patching", "integrations", "cache", "_paths"},
    "demo": {"ops", "methods", "patching", "integrations", "cache", "evaluation", "_paths"},
    "__init__": {"ops"},
    "commands": {"ops", "methods", "evaluation", "demo", "_paths"},
    "__main__": {"ops"},
}
# What a room imports only inside functions, when it is called.
LATER = {
    "patching": {"integrations"},
    "nn": {"cache"},
    "commands": {"_C"},
    "__main__": {"commands", "demo"},
}


def imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """(room, whether inside a function) of every import of tokred, those for types alone apart."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield from ((room, inside) for room in rooms_of(child, package))
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from visit(child, inside or function)

    yield from visit(tree, False)


def rooms_of(statement: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    """The rooms that a statement imports; what tokred itself exports is the ops'."""
    names = [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        above = package[: len(package) - statement.level + 1] if statement.level else ()
        module = ".".join((*above, *filter(None, [statement.module])))
        names = [f"tokred.{name}" for name in names] if module == "tokred" else [module]
    for name in names:
        top, *below = name.split(".")
        if top == "tokred":
            yield below[0] if below and below[0] in {*MAY_IMPORT, "_C"} else "ops"


def forbidden(path: str, text: str) -> list[str]:
    """The imports of a file, named from the package, that its room may not have."""
    parts = Path(path).with_suffix("").parts
    room, found = parts[0], []
    allowed = MAY_IMPORT[room] | ANYONE | {room}
    for other, inside in imported(ast.parse(text), ("tokred", *parts[:-1])):
        if other not in allowed | (LATER.get(room, set()) if inside else set()):
            found.append(f"{path} imports {other}: {room} may import {sorted(allowed)}")
    return found


def sources() -> dict[str, str]:
    return {p.relative_to(PACKAGE).as_posix(): p.read_text() for p in PACKAGE.rglob("*.py")}


def test_rooms_import_what_they_may() -> None:
    files = sources()
    assert {Path(path).with_suffix("").parts[0] for path in files} == set(MAY_IMPORT)
    found = [line for path, text in files.items() for line in forbidden(path, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ops/match.py", "from tokred.selection import ends"),
        ("ops/match.py", "def f():\n    from .. import reference"),
        ("methods/tome.py", "from tokred.patching import ReductionCall"),
        ("methods/tome.py", "import tokred.integrations.timm"),
        ("patching/handle.py", "from tokred import integrations"),
        ("patching/handle.py", "from ..integrations.timm import stacks"),
        ("integrations/diffusers.py", "from tokred.methods.tomesd import grid_of"),
        ("integrations/transformers/attention.py", "from ...cache import PackedCache"),
        ("cache/cache.py", "def f():\n    import tokred.demo.text"),
    ],
)
def test_a_planted_import_is_found(path: str, text: str) -> None:
    assert len(forbidden(path, text)) == 1


def test_types_and_late_imports_are_allowed() -> None:
    types = "if TYPE_CHECKING:\n    from tokred.patching import ReductionCall"
    assert not forbidden("methods/tome.py", types)
    assert not forbidden("patching/handle.py", "def f():\n    from tokred import integrations")
    assert not forbidden("methods/tome.py", "import tokred\nfrom tokred import PackedKV")


def test_patching_knows_no_integration() -> None:
    code = (
        "import sys, tokred.patching; libraries = ('timm', 'transformers', 'diffusers'); "
        "print(*[name for name in sys.modules if name.startswith('tokred.integrations') "
        "or name.split('.')[0] in libraries])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_missing_packages_are_named_with_their_extra() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import torch, tokred
layer = torch.nn.Linear(2, 2)
for call in (lambda: tokred.PackedCache, lambda: tokred.patch(layer, "fasa", dims=[])):
    try:
        call()
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    missing, refused = done.stdout.splitlines()
    advice = "transformers is not installed: pip install 'tokred[transformers]'"
    assert missing == f"ImportError tokred.cache: {advice}"
    assert refused.startswith("ValueError Linear has no layer") and advice in refused
