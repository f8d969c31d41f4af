"""The bugs that `make mutants` plants still have a place in the kernels, and tests to find them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant, occurrences

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_occurs_once(mutant: Mutant) -> None:
    assert occurrences(mutant) == 1
    assert all((TESTS / name).exists() for name in mutant.tests)
