"""Every program in examples/ runs, and prints what it is there to show."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

from tokred.compat import cache_keyword

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTS = {
    "vit_tome": [r"unpatched: 197 tokens", r"ToMe: +53 tokens", r"unmerged: +197", r"True"],
    "packed_cache": [
        r"4 bits: \d+ bytes a token, logits' cosine 0\.99",
        r"2 bits: \d+ bytes a token, logits' cosine 0\.9",
        r"generated 16 tokens",
    ],
    "sparse_decode": [r"256 of 8192 keys, [5-9]\d% of", r"dense attention: \d\.\de-0[67]"],
    "own_method": [r"k = 1024 of 1024 keys: .* 1\.0000", r"k = 64 of 1024 keys: .* 0\.[5-9]"],
}


def test_every_example_is_run() -> None:
    assert PRINTS.keys() == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", PRINTS)
def test_example(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    # They show the newest name of what has two.
    source = source.replace("cache=cache", f"{cache_keyword()}=cache")
    state = torch.get_rng_state()
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, f"{name}.py", "exec"), module.__dict__)
    torch.set_rng_state(state)
    printed = capsys.readouterr().out
    for pattern in PRINTS[name]:
        assert re.search(pattern, printed), (pattern, printed)
