"""Bad input to knn_reconstruct."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

D, X, C = torch.zeros(2, 3, 5), torch.zeros(2, 6, 8), torch.zeros(2, 3, 8)
knn = tokred.knn_reconstruct
backward = torch.ops.tokred.knn_reconstruct_backward.default
GRAD, OPTIONS = torch.zeros(2, 6, 5), (3, 0.1, "l1")
test_bad_input_names_the_argument = names_the_argument(
    [
        (knn, (D[0], X, C), {}, r"deep must have 3 dimensions \[B, M, D\]"),
        (knn, (D, X[0], C), {}, r"x must have 3 dimensions \[B, N, C\]"),
        (knn, (D, X, C[0]), {}, "centroids must have 3 dimensions"),
        (knn, (D[:1], X, C), {}, "deep must be"),
        (knn, (D.double(), X, C), {}, "deep must be float32"),
        (knn, (D, X.double(), C), {}, "x must be float32"),
        (knn, (D, X, C.half()), {}, "centroids must be float32"),
        (knn, (D, X, C[:, :2]), {}, "centroids must be"),
        (knn, (D, X, C[..., :7]), {}, "centroids must be"),
        (knn, (torch.zeros(2, 3, 10)[..., ::2], X, C), {}, "deep must be contiguous"),
        (knn, (D, torch.zeros(2, 6, 16)[..., ::2], C), {}, "x must be contiguous"),
        (knn, (D, X, torch.zeros(2, 3, 16)[..., ::2]), {}, "centroids must be contiguous"),
        (knn, (D, X, C, 0), {}, "k must be between 1 and 64, got 0"),
        (knn, (D, X, C, 65), {}, "k must be between 1 and 64, got 65"),
        (knn, (D, X, C), {"temperature": -1.0}, "temperature must be finite"),
        (knn, (D, X, C), {"norm": "l3"}, "norm must be one of l1, l2, got 'l3'"),
        (backward, (GRAD[0], X, C, *OPTIONS), {}, "grad_y must have 3 dimensions"),
        (backward, (GRAD[:, :5], X, C, *OPTIONS), {}, "grad_y must be"),
        (backward, (GRAD.double(), X, C, *OPTIONS), {}, "grad_y must be float32"),
        (backward, (GRAD[..., ::2], X, C, *OPTIONS), {}, "grad_y must be contiguous"),
        (backward, (GRAD, X, C[:1], *OPTIONS), {}, "centroids must be"),
        (backward, (GRAD, X, C, 0, 0.1, "l1"), {}, "k must be between 1 and 64, got 0"),
    ]
)
