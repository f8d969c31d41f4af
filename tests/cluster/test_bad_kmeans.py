"""Bad input to kmeans."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.zeros(2, 6, 8)
START = torch.zeros(2, 3, dtype=torch.int32)
kmeans = tokred.kmeans
test_bad_input_names_the_argument = names_the_argument(
    [
        (kmeans, (X[0], 3), {}, r"x must have 3 dimensions \[B, N, C\]"),
        (kmeans, (X.double(), 3), {}, "x must be float32"),
        (kmeans, (X[..., ::2], 3), {}, "x must be contiguous"),
        (kmeans, (X, -1), {}, "num_clusters must be between 0"),
        (kmeans, (X, 2**31), {}, "num_clusters must be between 0"),
        (kmeans, (X, 3, -1), {}, "iterations must be between 0 and 100000, got -1"),
        (kmeans, (X, 3), {"start": START.short()}, "start must be int32 token numbers"),
        (kmeans, (X, 3), {"start": START[:, :2]}, "start must be"),
        (kmeans, (X, 3), {"start": START[:1]}, "start must be"),
        (kmeans, (X, 3), {"start": torch.zeros(2, 3, 7)}, "start must be"),
        (kmeans, (X, 3), {"start": torch.zeros(2, 3)}, "start must have 3 dimensions"),
        (kmeans, (X, 3), {"start": torch.zeros(2, 3, 16)[..., ::2]}, "start must be contiguous"),
        (kmeans, (X.half(), 3), {"start": torch.zeros(2, 3, 8).half()}, "start must be int32"),
        (kmeans, (X, 3), {"mask": torch.ones(2, 5) > 0}, "mask must be"),
        (kmeans, (X, 3), {"mask": torch.ones(2, 6)}, "mask must be bool"),
        (kmeans, (X, 3), {"metric": "dot"}, "metric must be one of l2, cosine, got 'dot'"),
        (kmeans, (X, 3), {"tolerance": -1.0}, "tolerance must be finite and at least 0"),
        (kmeans, (X, 3), {"tolerance": float("nan")}, "tolerance must be finite"),
    ]
)
