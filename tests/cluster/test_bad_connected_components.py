"""Bad input to connected_components."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X = torch.zeros(2, 3, 4, 8)
components = tokred.connected_components
test_bad_input_names_the_argument = names_the_argument(
    [
        (components, (X[0], 1.0), {}, r"x must have 4 dimensions \[B, H, W, C\]"),
        (components, (X.double(), 1.0), {}, "x must be float32"),
        (components, (X[..., ::2], 1.0), {}, "x must be contiguous"),
        (components, (X, float("nan")), {}, "threshold must not be NaN"),
        (components, (X, 1.0, "dot"), {}, "metric must be one of l2, cosine, got 'dot'"),
        (components, (X, 1.0), {"mask": torch.ones(2, 3, 4) > 0}, "mask must have 2 dimensions"),
        (components, (X, 1.0), {"mask": torch.ones(2, 11) > 0}, "mask must be"),
        (components, (X, 1.0), {"mask": torch.ones(2, 12)}, "mask must be bool"),
        (
            components,
            (torch.zeros(1).half().expand(1, 65536, 65536, 1), 1.0),
            {},
            "x may have at most",
        ),
    ]
)
