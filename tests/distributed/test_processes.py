"""tokred.distributed: every op has a rule, and several processes compute what one does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokred.distributed
from cases.op_calls import op_names
from tokred.distributed import combine_over_ranks
from tokred.distributed.sharding import Rule
from tokred.ops.placements import REFUSED, RULES
from tokred.patching import AttentionCall

FOLDER = Path(__file__).parent


def test_every_op_has_a_rule_or_a_refusal() -> None:
    assert {*RULES, *REFUSED} == set(op_names()) and not {*RULES} & {*REFUSED}
    for op in RULES:
        schema, rule = getattr(torch.ops.tokred, op).default._schema, Rule.of(op)
        tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
        assert sorted(rule.arguments) == sorted(tensors), op
        assert len(rule.results) == len(schema.returns), op


def test_without_torchs_interface_all_but_the_rules_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.distributed.tensor._op_schema", None)
        patch.delitem(sys.modules, "tokred.distributed.sharding")
        without = importlib.reload(tokred.distributed)
        with pytest.raises(RuntimeError, match=r"not work on DTensors.*_op_schema"):
            without.register()
        assert without.combine_over_ranks is combine_over_ranks
    importlib.reload(tokred.distributed).register()


def test_votes_of_unknown_heads_are_refused() -> None:
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    call = AttentionCall(q, k, k, scale=1.0, mask=None, causal=True, other_heads="unknown")
    assert call.score("group_mean").shape == (1, 2, 9)
    with pytest.raises(ValueError, match="make the model parallel with torch's parallelize_module"):
        call.score("softmax_vote")


def test_processes_agree_with_one() -> None:
    """2 and 4 Gloo processes; see processes.py."""
    paths = [str(FOLDER.parent), str(Path(tokred.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, FOLDER / "processes.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,  # each rank ends itself before
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
