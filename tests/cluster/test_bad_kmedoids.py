"""Bad input to kmedoids."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.zeros(2, 6, 8)
START = torch.zeros(2, 3, dtype=torch.int32)
kmedoids = tokred.kmedoids
test_bad_input_names_the_argument = names_the_argument(
    [
        (kmedoids, (X[0], 3, 9, START), {}, r"x must have 3 dimensions \[B, N, C\]"),
        (kmedoids, (X.double(), 3, 9, START), {}, "x must be float32"),
        (kmedoids, (X[..., ::2], 3, 9, START), {}, "x must be contiguous"),
        (kmedoids, (X, -1, 9, START), {}, "num_clusters must be between 0"),
        (kmedoids, (X, 3, -1, START), {}, "iterations must be between 0 and 100000, got -1"),
        (kmedoids, (X, 3, 9, START.short()), {}, "start must be int32"),
        (kmedoids, (X, 3, 9, START[:, :2]), {}, "start must be"),
        (kmedoids, (X, 3, 9, START[:1]), {}, "start must be"),
        (kmedoids, (X, 3, 9, START[0]), {}, "start must have 2 dimensions"),
        (kmedoids, (X, 3, 9, START), {"mask": torch.ones(2, 5) > 0}, "mask must be"),
        (kmedoids, (X, 3, 9, START), {"mask": torch.ones(2, 6)}, "mask must be bool"),
        (kmedoids, (X, 3, 9, START), {"metric": "dot"}, "metric must be one of l2, cosine"),
    ]
)
