"""Bad input to greedy_select."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X, START = torch.zeros(2, 5, 8), torch.zeros(2, dtype=torch.int32)
select = tokred.greedy_select
test_bad_input_names_the_argument = names_the_argument(
    [
        (select, (X[0], 2), {}, r"x must have 3 dimensions \[B, N, C\]"),
        (select, (X.double(), 2), {}, "x must be float32"),
        (select, (X[..., ::2], 2), {}, "x must be contiguous"),
        (select, (X, -1), {}, "k must be between 0 and"),
        (select, (X, 2**31), {}, "k must be between 0 and"),
        (select, (X, 2, "random"), {}, "rule must be one of kcenter, maxsum, mmr, facility"),
        (select, (X, 2), {"weight": X[..., 0].double()}, "weight must be float32"),
        (select, (X, 2), {"weight": X[:, :4, 0]}, "weight must be"),
        (select, (X, 2), {"start": START.short()}, "start must be int32"),
        (select, (X, 2), {"start": START[:1]}, "start must be"),
        (select, (X, 2), {"mask": X[..., 0]}, "mask must be bool"),
        (select, (X, 2), {"mask": X[:1, :, 0] > 0}, "mask must be"),
        (select, (X, 2), {"metric": "half_cosine"}, "metric must be one of cosine, l2, dot"),
        (select, (X, 2, "facility"), {"metric": "l2"}, "metric must be cosine or dot"),
        (select, (X, 2), {"first": "last"}, "first must be one of rule, norm, isolated"),
        (select, (X, 2), {"trade_off": 1.5}, "trade_off must be between 0 and 1"),
        (select, (X, 2), {"trade_off": float("nan")}, "trade_off must be between 0 and 1"),
    ]
)
