"""Every Python snippet of the README runs, and what it points at exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINKS = re.findall(r"!?\[[^\]]*\]\((?!https?:)([^)#]+)\)", README)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[-1][:40])
def test_snippet_runs(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("target", LINKS)
def test_link_exists(target: str) -> None:
    assert (ROOT / target).exists()


def test_paths_in_the_readme_exist() -> None:
    folders = re.findall(r"`((?:csrc|python|tests|bench)/[\w/.]*)`", README)
    assert folders
    for folder in folders:
        assert (ROOT / folder).exists(), folder
