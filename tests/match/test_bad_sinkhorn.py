"""Bad input of sinkhorn."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

X, ANCHORS = torch.zeros(2, 6, 8), torch.zeros(2, 4, 8)
AT, TO = torch.zeros(2, 6, 2), torch.zeros(2, 4, 2)
sinkhorn = tokred.sinkhorn
CASES = [
    (sinkhorn, (X[0], ANCHORS), {}, "x must have 3 dimensions"),
    (sinkhorn, (X, ANCHORS[0]), {}, "anchors must have 3 dimensions"),
    (sinkhorn, (X.double(), ANCHORS.double()), {}, "x must be float32, float16 or bfloat16"),
    (sinkhorn, (X, ANCHORS.half()), {}, "anchors must have the dtype of x"),
    (sinkhorn, (X, ANCHORS[:1]), {}, "anchors must have the batch and channel sizes of x"),
    (sinkhorn, (X, ANCHORS[..., :4]), {}, "anchors must have the batch and channel sizes of x"),
    (sinkhorn, (X[..., ::2], ANCHORS[..., ::2]), {}, "x must be contiguous in its last dimension"),
    (sinkhorn, (X, ANCHORS, AT), {}, "position_x and position_anchors go together"),
    (sinkhorn, (X, ANCHORS, AT, AT), {}, "position_anchors must be"),
    (sinkhorn, (X, ANCHORS, AT[..., :1], TO), {}, "position_x must be"),
    (sinkhorn, (X, ANCHORS, AT.double(), TO), {}, "position_x must be float32"),
    (sinkhorn, (X, ANCHORS), {"time_x": AT[..., 0]}, "time_x and time_anchors go together"),
    (sinkhorn, (X, ANCHORS), {"time_x": AT, "time_anchors": TO}, "time_x must"),
    (sinkhorn, (X, ANCHORS), {"mask_x": torch.ones(2, 6)}, "mask_x must be bool"),
    (sinkhorn, (X, ANCHORS), {"mask_anchors": torch.ones(2, 5).bool()}, "mask_anchors must be"),
    (sinkhorn, (X, ANCHORS), {"offset": torch.ones(3)}, "offset must be"),
    (sinkhorn, (X, ANCHORS), {"offset": torch.ones(2).double()}, "offset must be float32"),
    (sinkhorn, (X, ANCHORS), {"position_weight": torch.inf}, "position_weight must be finite"),
    (sinkhorn, (X, ANCHORS), {"time_scale": 0.0}, "time_scale must be positive"),
    (sinkhorn, (X, ANCHORS), {"eps": 0.0}, "eps must be finite and at least 1e-6"),
    (sinkhorn, (X, ANCHORS), {"eps": torch.nan}, "eps must be finite"),
    (sinkhorn, (X, ANCHORS), {"iterations": 0}, "iterations must be at least 1"),
    (sinkhorn, (X, ANCHORS), {"tolerance": -1.0}, "tolerance must be at least 0"),
]
GRADS, STEPS = (ANCHORS, torch.zeros(2, 4)), torch.ones(2).int()
NONE, OPTIONS = (None,) * 7, (0.5, 1.5, 0.1, 100)
backward = torch.ops.tokred.sinkhorn_backward.default
CASES += [
    (backward, (*grads, X, ANCHORS, *NONE, steps, *options), {}, message)
    for grads, steps, options, message in (
        ((X, GRADS[1]), STEPS, OPTIONS, "grad_aggregation must be"),
        ((ANCHORS.half(), GRADS[1]), STEPS, OPTIONS, "grad_aggregation must be float32"),
        ((ANCHORS.mT.contiguous().mT, GRADS[1]), STEPS, OPTIONS, "grad_aggregation must be cont"),
        ((ANCHORS, GRADS[1][:, :3]), STEPS, OPTIONS, "grad_load must be"),
        ((ANCHORS, GRADS[1].double()), STEPS, OPTIONS, "grad_load must be float32"),
        (GRADS, STEPS[:1], OPTIONS, "steps must be"),
        (GRADS, STEPS.short(), OPTIONS, "steps must be int32"),
        (GRADS, STEPS, (0.5, 1.5, 0.0, 100), "eps must be finite and at least 1e-6"),
        (GRADS, STEPS, (0.5, 1.5, 0.1, 0), "iterations must be at least 1"),
    )
]
test_bad_sinkhorn = names_the_argument(CASES)
