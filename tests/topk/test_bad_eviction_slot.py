"""Bad input of eviction_slot and replace_token: every error names the argument."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.bad_input import names_the_argument

P = torch.arange(6, dtype=torch.int32).expand(2, 2, 6).contiguous()
X = torch.zeros(2, 2, 6)
Q, LSE = torch.zeros(2, 4, 6), torch.zeros(2, 4)
START, SLOT = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 2, 1, dtype=torch.int32)
K, NEW = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 1, 8)
evict, put = tokred.eviction_slot, tokred.replace_token

test_bad_input_names_the_argument = names_the_argument(
    [
        (evict, (P.short(), 6), {}, "position must be int32"),
        (evict, (P[0], 6), {}, "position must have 3 dimensions"),
        (evict, (P[..., ::2], 6), {}, "position must be contiguous"),
        (evict, (P, -1), {}, "length must be at least 0"),
        (evict, (P, 6), {"first": -1}, "first must be at least 0"),
        (evict, (P, 6), {"recent": -1}, "recent must be at least 0"),
        (evict, (P, 6, X.half()), {}, "scores must be float32"),
        (evict, (P, 6, X[:1]), {}, r"scores must be \[B, H, N\]"),
        (evict, (P, 6, X[..., :1].expand(2, 2, 6)), {}, "scores must be contiguous"),
        (evict, (P, 6, None, Q), {}, "logits and lse go together"),
        (evict, (P, 6, None, Q[:, :3], LSE[:, :3]), {}, "heads of logits must be a multiple"),
        (evict, (P, 6, None, Q.double(), LSE), {}, "logits must be float32"),
        (evict, (P, 6, None, Q[..., :5], LSE), {}, r"logits must be \[B, Hq, N\]"),
        (evict, (P, 6, None, Q, LSE[:1]), {}, r"lse must be \[B, Hq\]"),
        (evict, (P, 6, None, Q, LSE.half()), {}, "lse must be float32"),
        (evict, (P, 6), {"bias": X[..., :5]}, r"bias must be \[B | 1, H | 1, N\]"),
        (evict, (P, 6), {"bias": X.half()}, "bias must be float32"),
        (evict, (P, 6), {"start": START[:1]}, r"start must be \[B\]"),
        (evict, (P, 6), {"start": START.float()}, "start must be int32"),
        (evict, (P, 6), {"newest": SLOT[:1]}, r"newest must be \[B, H, 1\]"),
        (evict, (P, 6), {"softcap": 0.0}, "softcap must be positive"),
        (put, (SLOT.float(), K, NEW, K + 0, NEW), {}, "slot must be int32"),
        (put, (SLOT[..., 0], K, NEW, K + 0, NEW), {}, "slot must have 3 dimensions"),
        (put, (SLOT, K[:1], NEW, K + 0, NEW), {}, r"keys must be \[B, H, N, ..\]"),
        (put, (SLOT, K, NEW, K[:, :, :5] + 0, NEW), {}, r"values must be \[B, H, N, ..\]"),
        (put, (SLOT, K, NEW[..., :7], K + 0, NEW), {}, "new_keys must be keys"),
        (put, (SLOT, K, NEW, K + 0, K), {}, "new_values must be values"),
        (put, (SLOT, K, NEW.half(), K + 0, NEW), {}, "new_keys must have the dtype of keys"),
        (put, (SLOT, K, NEW, K, NEW), {}, "values must not share memory with keys"),
        (put, (SLOT, K, K[:, :, :1], K + 0, NEW), {}, "keys must not share memory with new_keys"),
        (put, (SLOT, K[:, :, :1].expand(2, 2, 6, 8), NEW, K, NEW), {}, "keys must not overlap"),
        (put, (SLOT, K[..., ::2], NEW[..., :4], K + 0, NEW), {}, "contiguous within a token"),
        (put, (SLOT, K, NEW, K + 0, NEW, P.float()), {}, "position must be int32"),
        (put, (SLOT, K, NEW, K + 0, NEW, P[..., :5]), {}, r"position must be \[B, H, N\]"),
        (put, (SLOT, K, NEW, K + 0, NEW, P, 2**31), {}, "new_position must be -1 to"),
    ]
)


def test_a_refused_token_is_not_written() -> None:
    k, v = torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 8)
    with pytest.raises(ValueError, match="new_values"):
        put(SLOT, k, NEW + 1, v, NEW[..., :7])
    assert not k.any() and k._version == 0
