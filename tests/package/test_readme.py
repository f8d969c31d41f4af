"""Every Python snippet of the pages runs, and what the pages point at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokred.compat import cache_keyword, has_flat_dinov2

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
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
    assert {"README.md", "ops.md", "caches.md"} <= pages
    assert found(FOLDER)


@pytest.mark.parametrize(("page", "snippet"), found(SNIPPET))
def test_snippet_runs(page: Path, snippet: str) -> None:
    if "Dinov2" in snippet and not has_flat_dinov2():
        pytest.skip("merging in DINOv2 needs transformers 5.18 or newer")
    # The pages show the newest name of what has two.
    snippet = snippet.replace("cache=cache", f"{cache_keyword()}=cache")
    exec(compile(snippet, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize(("page", "target"), found(LINK))
def test_link_exists(page: Path, target: str) -> None:
    assert (page.parent / target).exists()


@pytest.mark.parametrize(("page", "folder"), found(FOLDER))
def test_path_exists(page: Path, folder: str) -> None:
    assert (ROOT / folder).exists()


def test_the_readme_is_short() -> None:
    """It has one table of measurements; docs/benchmarks.md has all others. Methods are by name."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert re.findall(r"<!-- table:(\w+) -->", text) == ["methods", "headline"]
