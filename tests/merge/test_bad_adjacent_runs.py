"""Bad input of adjacent_runs: every error names the argument."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.randn(2, 6, 8)
MASK = torch.ones(2, 6, dtype=torch.bool)

test_bad_input_names_the_argument = names_the_argument(
    [
        (tokred.adjacent_runs, (X.int(), 0.5), {}, "x must be float32"),
        (tokred.adjacent_runs, (X.double(), 0.5), {}, "x must be float32"),
        (tokred.adjacent_runs, (X[..., ::2], 0.5), {}, "x must be contiguous"),
        (tokred.adjacent_runs, (X, torch.nan), {}, "threshold must be a number"),
        (tokred.adjacent_runs, (X, 0.5, X[:, :5]), {}, "y must be"),
        (tokred.adjacent_runs, (X, 0.5, X.half()), {}, "y must have the dtype of x"),
        (tokred.adjacent_runs, (X, 0.5, None, MASK[:, :5]), {}, "mask must be"),
        (tokred.adjacent_runs, (X, 0.5, None, MASK.int()), {}, "mask must be bool"),
        (tokred.adjacent_runs, (X, 0.5), {"max_length": -1}, "max_length must be at least 0"),
        (tokred.adjacent_runs, (X, 0.5), {"num_sinks": -1}, "num_sinks must be at least 0"),
        (tokred.adjacent_runs, (X, 0.5), {"num_locals": -1}, "num_locals must be at least 0"),
    ]
)


def test_other_leading_dimensions() -> None:
    heads = torch.randn(2, 6, 3, 8).transpose(1, 2)
    with pytest.raises(ValueError, match="leading dimensions of x must fold into one"):
        tokred.adjacent_runs(heads, 0.5)
    with pytest.raises(ValueError, match=r"mask must be \[2, 3, 6\]"):
        tokred.adjacent_runs(heads.contiguous(), 0.5, mask=MASK)
    with pytest.raises(ValueError, match=r"x must be \[..., N, C\]"):
        tokred.adjacent_runs(X[0, 0], 0.5)
