"""Bad input to local_soft_kmeans."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.zeros(2, 12, 8)
soft = tokred.local_soft_kmeans
GRID, CLUSTERS = (3, 4), (2, 2)
test_bad_input_names_the_argument = names_the_argument(
    [
        (soft, (X[0], GRID, CLUSTERS), {}, "x must have 3 dimensions"),
        (soft, (X.double(), GRID, CLUSTERS), {}, "x must be float32"),
        (soft, (X[..., ::2], GRID, CLUSTERS), {}, "x must be contiguous"),
        (soft, (X, (3, 5), CLUSTERS), {}, r"grid must have as many tokens as x \(12\), got 3 x 5"),
        (soft, (X, (-3, -4), CLUSTERS), {}, "grid must have"),
        (soft, (X, GRID, (4, 2)), {}, "clusters must be between 0 and the grid"),
        (soft, (X, GRID, (2, -1)), {}, "clusters must be between"),
        (soft, (X, GRID, CLUSTERS, -1), {}, "iterations must be between 0 and 100000, got -1"),
        (soft, (X, GRID, CLUSTERS), {"temperature": float("nan")}, "temperature must be finite"),
        (soft, (X, GRID, CLUSTERS), {"temperature": -0.5}, "temperature must be finite"),
        (
            soft,
            (X, GRID, CLUSTERS),
            {"window": 4},
            "window must be odd and between 1 and 255, got 4",
        ),
        (soft, (X, GRID, CLUSTERS), {"window": -1}, "window must be odd"),
    ]
)
