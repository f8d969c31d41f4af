"""Bad input of segment_weights and segment_pool: every error names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.randn(2, 6, 8)
IDS = torch.zeros(2, 6, dtype=torch.int32)
OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
W = torch.ones(2, 6)
BY = {"ids": IDS, "num_segments": 3}
GAUSS = {**BY, "mode": "gaussian"}

test_bad_input_names_the_argument = names_the_argument(
    [
        (tokred.segment_weights, (), {**BY, "mode": "median", "weight": W}, "mode must be one of"),
        (tokred.segment_weights, (), {**BY, "mode": "softmax"}, "mode softmax needs weight"),
        (tokred.segment_weights, (), {**BY, "mode": "last", "weight": W}, "weight is for the"),
        (tokred.segment_weights, (), GAUSS, "mode gaussian needs x"),
        (tokred.segment_weights, (), {**BY, "weight": W, "x": X}, "x is for mode gaussian"),
        (tokred.segment_weights, (), {**BY, "weight": W, "sigma": 1.0}, "sigma is for mode"),
        (tokred.segment_weights, (), {**GAUSS, "x": X, "sigma": 0.0}, "sigma must be positive"),
        (tokred.segment_weights, (), {**GAUSS, "x": X, "sigma": torch.nan}, "sigma must be pos"),
        (tokred.segment_weights, (), {**GAUSS, "x": X.int()}, "x must be float32"),
        (tokred.segment_weights, (), {**GAUSS, "x": X[..., ::2]}, "x must be contiguous"),
        (tokred.segment_weights, (), {**GAUSS, "x": X, "weight": W.double()}, "weight must be f"),
        (tokred.segment_weights, (), {**BY, "weight": W.half()}, "weight must be float32"),
        (tokred.segment_weights, (), {**BY, "weight": W, "ids": IDS.short()}, "ids must be int32"),
        (tokred.segment_weights, (), {**BY, "weight": W, "num_segments": -1}, "num_segments must"),
        (tokred.segment_pool, (X.int(),), BY, "x must be float32"),
        (tokred.segment_pool, (X[..., ::2],), BY, "x must be contiguous"),
        (tokred.segment_pool, (X, None, IDS.short(), 3), {}, "token_map must be int32"),
        (tokred.segment_pool, (X, None, IDS[:1], 3), {}, "token_map must be"),
        (tokred.segment_pool, (X,), {**BY, "weight": W.half()}, "weight must be float32"),
    ]
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "median", **BY}, "mode must be one of"),
        ({"mode": "amax", "weight": W, **BY}, "weight must be None in mode 'amax'"),
        ({"sigma": 1.0, **BY}, "sigma is for mode 'gaussian'"),
        ({}, "by offsets or by ids"),
        ({"offsets": OFFSETS, **BY}, "by offsets or by ids"),
        ({"ids": IDS}, "num_segments must be given"),
        ({"offsets": OFFSETS.short()}, "offsets must be int32"),
        ({"offsets": OFFSETS.flip(0)}, "offsets must ascend"),
        ({"offsets": OFFSETS[:0]}, "offsets must be"),
        ({"offsets": OFFSETS.expand(3, 3)}, r"offsets must be \[2, 'S \+ 1'\] or"),
        ({"offsets": OFFSETS, "num_segments": 5}, "num_segments must be 2"),
        ({"x": X[0], "ids": IDS, "num_segments": 3}, r"ids must be \[6\]"),
        ({"x": X[0, 0], **BY}, "x must be"),
        ({"x": torch.randn(2, 6, 3, 8).transpose(1, 2), "offsets": OFFSETS}, "fold into one"),
    ],
)
def test_segment_pool_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokred.segment_pool(**({"x": X} | arguments))


def test_segment_weights_refuses() -> None:
    with pytest.raises(ValueError, match="num_tokens must be given"):
        tokred.segment_weights(OFFSETS, mode="sqrt")
    with pytest.raises(ValueError, match="weight, which chooses the pivots, requires grad"):
        tokred.segment_weights(x=X, weight=W.clone().requires_grad_(), **GAUSS)
    with pytest.raises(TypeError, match="x must be a tensor"):
        tokred.segment_pool(None, **BY)  # type: ignore[arg-type]
