"""Bad input to dpc_knn."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.zeros(2, 5, 8)
cluster = tokred.dpc_knn
test_bad_input_names_the_argument = names_the_argument(
    [
        (cluster, (X[0], 2), {}, r"x must have 3 dimensions \[B, N, C\]"),
        (cluster, (X.double(), 2), {}, "x must be float32"),
        (cluster, (X[..., ::2], 2), {}, "x must be contiguous"),
        (cluster, (X, -1), {}, "num_clusters must be between 0 and"),
        (cluster, (X, 2**31), {}, "num_clusters must be between 0 and"),
        (cluster, (X, 2, 0), {}, "k must be at least 1, got 0"),
        (cluster, (X, 2), {"mask": X[..., 0]}, "mask must be bool"),
        (cluster, (X, 2), {"mask": X[:, :4, 0] > 0}, "mask must be"),
    ]
)
