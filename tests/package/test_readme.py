"""Every Python snippet of the pages runs, tests in them pass, and what pages point at exists."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from cases.new_methods import methods_in
from tokred.compat import cache_keyword, has_flat_dinov2

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
METHOD_FILE = re.compile(r"```python\n# python/tokred/methods/(\w+\.py)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?!https?:)([^)#]+)\)")
FOLDER = re.compile(r"`((?:csrc|python|tests|bench|docs|examples)/[\w/.]*)`")


def found(pattern: re.Pattern[str]) -> list:
    """(page, match) of all pages, as parameters."""
    return [
        pytest.param(page, text, id=f"{page.name}: {text.splitlines()[-1][:40]}")
        for page in PAGES
        for text in dict.fromkeys(pattern.findall(page.read_text()))
    ]


def test_there_are_snippets() -> None:
    pages = {parameters.values[0].name for parameters in found(SNIPPET)}
    assert {"README.md", "ops.md", "caches.md", "adding_a_method.md"} <= pages
    assert found(FOLDER)


@pytest.fixture
def shown_methods(page: Path, tmp_path: Path) -> Iterator[None]:
    """What a page shows as the file of a method is one."""
    for name, text in METHOD_FILE.findall(page.read_text()):
        (tmp_path / name).write_text(text)
    with methods_in(tmp_path):
        yield


@pytest.mark.usefixtures("shown_methods")
@pytest.mark.parametrize(("page", "snippet"), found(SNIPPET))
def test_snippet_runs(page: Path, snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "Dinov2" in snippet and not has_flat_dinov2():
        pytest.skip("merging in DINOv2 needs transformers 5.18 or newer")
    if page.stem == "vision_language":
        import cases.tiny_vlms  # noqa: F401  (skips with a transformers that is too old)
    # The pages show the newest name of what has two.
    snippet = re.sub(r"\bcache=(?=cache|tokred)", f"{cache_keyword()}=", snippet)
    module = ModuleType(page.stem)
    monkeypatch.setitem(sys.modules, page.stem, module)
    exec(compile(snippet, str(page), "exec", dont_inherit=True), vars(module))
    for name, function in [*vars(module).items()]:
        if name.startswith("test_"):
            function()


@pytest.mark.parametrize(("page", "target"), found(LINK))
def test_link_exists(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize(("page", "folder"), found(FOLDER))
def test_path_exists(page: Path, folder: str) -> None:
    assert (ROOT / folder).exists()


def test_the_readme_is_short() -> None:
    """It has one table of measurements (docs/benchmarks.md all), and methods and ops by name."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert re.findall(r"<!-- table:(\w+) -->", text) == ["methods", "headline", "ops"]
