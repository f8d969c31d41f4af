"""Bad input of forest_roots and forest_merge: every error names the argument."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.randn(2, 3, 8)
PARENT = torch.tensor([[-1, 0, 1], [-1, -1, -1]], dtype=torch.int32)
CYCLE = torch.tensor([[-1, 0, 1], [-1, 2, 1]], dtype=torch.int32)

test_bad_input_names_the_argument = names_the_argument(
    [
        (tokred.forest_roots, (PARENT.short(),), {}, "parent must be int32"),
        (tokred.forest_roots, (PARENT[0],), {}, "parent must have 2 dimensions"),
        (tokred.forest_roots, (CYCLE,), {}, "parent must be a forest, but in item 1 token 1"),
        (tokred.forest_merge, (X, CYCLE), {}, "parent must be a forest, but in item 1 token 1"),
        (tokred.forest_merge, (X.int(), PARENT), {}, "x must be float32"),
        (tokred.forest_merge, (X, PARENT[:1]), {}, "token_map must be"),
        (tokred.forest_merge, (X, PARENT, X[:, :, 0].half()), {}, "size must be float32"),
    ]
)


def test_forest_merge_refuses() -> None:
    with pytest.raises(ValueError, match="size must be None with reference_compat"):
        tokred.forest_merge(X, PARENT, torch.ones(2, 3), True)
    with pytest.raises(TypeError, match="x must be a tensor"):
        tokred.forest_merge(None, PARENT)  # type: ignore[arg-type]
