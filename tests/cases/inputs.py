"""How random inputs are drawn, cases named, and inputs widened to the precision of an oracle."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

WIDE = pytest.mark.wide
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def label(case: Any) -> str:
    """A test id: the fields of a dataclass that differ from their defaults."""
    values = {f.name: getattr(case, f.name) for f in fields(case)}
    changed = [f.name for f in fields(case) if values[f.name] != f.default]
    return ",".join(f"{name}={values[name]}".replace("torch.", "") for name in changed) or "default"


def wide(*rows: Any) -> list[Any]:
    """Rows of a parametrised test that `make test-all` runs and `make test` does not."""
    return [pytest.param(*(row if type(row) is tuple else (row,)), marks=WIDE) for row in rows]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def widened(inputs: tuple) -> tuple:
    """The inputs with their float tensors in float64."""
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    )
