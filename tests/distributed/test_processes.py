"""tokred.distributed: every op has a rule, and several processes compute what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from cases.op_calls import op_names
from tokred.distributed.sharding import REFUSED, RULES, Rule

FOLDER = Path(__file__).parent


def test_every_op_has_a_rule_or_a_refusal() -> None:
    assert {*RULES, *REFUSED} == set(op_names()) and not {*RULES} & {*REFUSED}
    for op in RULES:
        schema, rule = getattr(torch.ops.tokred, op).default._schema, Rule.of(op)
        tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
        assert sorted(rule.arguments) == sorted(tensors), op
        assert len(rule.results) == len(schema.returns), op


def test_processes_agree_with_one() -> None:
    """In 2 and 4 Gloo processes; see processes.py."""
    paths = [str(FOLDER.parents[0]), *sys.path]
    done = subprocess.run(
        [sys.executable, FOLDER / "processes.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
