"""Bad input of ema_scan: every error names the argument."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

C = torch.randn(2, 6, 8)
P = torch.rand(2, 6)
STATE = torch.zeros(2, 8)
LENGTHS = torch.tensor([3, 6], dtype=torch.int32)

test_bad_input_names_the_argument = names_the_argument(
    [
        (tokred.ema_scan, (C.int(), P), {}, "c must be float32"),
        (tokred.ema_scan, (C[0], P), {}, "c must have 3 dimensions"),
        (tokred.ema_scan, (C[..., ::2], P), {}, "c must be contiguous"),
        (tokred.ema_scan, (C, P[:, :5]), {}, r"p must be \[B, M\]"),
        (tokred.ema_scan, (C, P[..., None]), {}, "p must have 2 dimensions"),
        (tokred.ema_scan, (C, P.half()), {}, "p must be float32"),
        (tokred.ema_scan, (C.double(), P), {}, "p must be float64"),
        (tokred.ema_scan, (C, P, STATE[:, :5]), {}, r"state must be \[B, C\]"),
        (tokred.ema_scan, (C, P, STATE.double()), {}, "state must be float32"),
        (tokred.ema_scan, (C, P, None, LENGTHS.short()), {}, "lengths must be int32"),
        (tokred.ema_scan, (C, P, None, LENGTHS[:1]), {}, "lengths must be"),
    ]
)
