"""What linear_attention refuses."""

from __future__ import annotations

import torch

import tokred
from cases.bad_input import names_the_argument

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
DECAY, STATE = torch.zeros(2), torch.zeros(2, 2, 8, 6)
MASK = torch.ones(2, 5, dtype=torch.bool)
OK = (Q, K, V, DECAY)
linear = tokred.linear_attention

test_linear_attention = names_the_argument(
    [
        (linear, (Q[0], K, V, DECAY), {}, "q must have 4 dimensions"),
        (linear, (Q.int(), K, V, DECAY), {}, "q must be float32, float16 or bfloat16"),
        (linear, (Q, K.half(), V, DECAY), {}, "k must have the dtype of q"),
        (linear, (Q, K[:1], V, DECAY), {}, "k must have the batch and head sizes of q"),
        (linear, (Q[:, :3], K, V, DECAY), {}, "the heads of q must be a multiple"),
        (linear, (Q, K, V[:, :, :4], DECAY), {}, "v must have the batch, heads and keys of k"),
        (linear, (Q[:, :, :4], K, V, DECAY), {}, "q and k must have the same tokens, got 4 and 5"),
        (linear, (Q[..., ::2], K[..., ::2], V, DECAY), {}, "q must be contiguous in its last"),
        (linear, (Q, K, V, DECAY[:1]), {}, r"decay must be \[Hkv\] with size 2"),
        (linear, (Q, K, V, DECAY[None]), {}, "decay must have 1 dimensions"),
        (linear, (Q, K, V, DECAY.double()), {}, "decay must be float32, got float64"),
        (linear, OK, {"state": STATE[:1]}, r"state must be \[B, Hkv, D, Dv\] with size 2"),
        (linear, OK, {"state": STATE.mT}, "state must be"),
        (linear, OK, {"state": STATE.half()}, "state must be float32, got float16"),
        (linear, OK, {"state": STATE.mT.contiguous().mT}, "state must be contiguous in its last"),
        (linear, OK, {"scale": float("nan")}, "scale must be finite"),
        (linear, OK, {"mask": MASK[:, :4]}, "mask must be"),
        (linear, OK, {"mask": MASK.int()}, "mask must be bool"),
        (
            torch.ops.tokred.linear_attention_backward.default,
            (Q, STATE, *OK, None, 1.0, None),
            {},
            "grad_out must be",
        ),
        (
            torch.ops.tokred.linear_attention_backward.default,
            (Q[..., :6].contiguous(), STATE.half(), *OK, None, 1.0, None),
            {},
            "grad_state must be float32",
        ),
    ]
)
