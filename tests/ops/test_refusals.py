"""Errors of ops as Python has them, 64-bit indices, and the log of calls."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import tokred
from cases.inputs import generator
from tokred.ops.op_log import line

X = torch.randn(2, 6, 8, generator=generator(0))
MAP = torch.tensor([[0, 1, 2, 0, 1, -1], [2, 2, 1, 0, 0, 1]])


def test_indices_of_64_bits_are_taken_as_those_of_32() -> None:
    assert torch.equal(tokred.merge(X, MAP, 3)[0], tokred.merge(X, MAP.int(), 3)[0])
    assert torch.equal(tokred.compose(MAP, MAP.int()), tokred.compose(MAP.int(), MAP.int()))
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=generator(1))
    lists = torch.tensor([[[[0, 5, -1]]]])
    expected = tokred.sparse_attention(q, k, v, lists.int(), block_q=6)[0]
    assert torch.equal(tokred.sparse_attention(q, k, v, lists, block_q=6)[0], expected)
    x = X.clone().requires_grad_()
    grads = [
        torch.autograd.grad(tokred.merge(x, each, 3)[0].square().sum(), x)[0]
        for each in (MAP, MAP.int())
    ]
    assert torch.equal(*grads)
    for number in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"token_map must fit into int32.*{number}"):
            tokred.merge(X, torch.full((2, 6), number), 3)
    assert torch.equal(
        tokred.merge(X, torch.full((2, 6), -(2**31)), 3)[0],
        tokred.merge(X, torch.full((2, 6), -1).int(), 3)[0],
    )


def test_kinds_of_errors() -> None:
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"^tokred: k must be between 0 and 2\^31 - 1, got -1$"):
            tokred.topk(X, -1)
    with pytest.raises(TypeError, match=r"^tokred: k must be of type int, got str$"):
        tokred.topk(X, "3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tokred: threshold must be of type float or None, got"):
        tokred.topk(X, 3, threshold="0")  # type: ignore[arg-type]


def test_calls_are_logged_where_the_environment_asks() -> None:
    args = (X, 3, None, "score", None, 0, 0, None, None, 1, None, 0)
    assert line(torch.ops.tokred.topk.default, args) == "topk(scores=float32[2, 6, 8], k=3)"
    code = "import torch, tokred; tokred.topk(torch.zeros(2, 3), 1)"
    shown = {}
    for asked in ("ops", ""):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TOKRED_LOG": asked},
            capture_output=True,
            text=True,
            check=True,
        )
        shown[asked] = ran.stderr
    assert "tokred: topk(scores=float32[2, 3], k=1)\n" in shown["ops"]
    assert "topk" not in shown[""]
