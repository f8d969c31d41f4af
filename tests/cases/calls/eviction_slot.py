"""Calls of eviction_slot and replace_token."""

from __future__ import annotations

import torch

from ..sizes import INT, Sizes, random, whole


def _evicted(s: Sizes) -> tuple:
    position = torch.arange(s.n, dtype=INT).expand(s.b, s.hk, s.n).contiguous()
    return (
        position, s.n, random(s.b, s.hk, s.n), random(s.b, s.hq, s.n), random(s.b, s.hq) + 3,
        torch.zeros(s.b, s.hk, s.n), whole(s.n, s.b), whole(s.n, s.b, s.hk, 1), 1, 2, False, False,
        30.0,
    )  # fmt: skip


def _replaced(s: Sizes) -> tuple:
    keys, values = random(s.b, s.hk, s.n, s.d), random(s.b, s.hk, s.n, s.dv)
    new = random(s.b, s.hk, 1, s.d), random(s.b, s.hk, 1, s.dv)
    return (
        whole(s.n, s.b, s.hk, 1), keys, new[0], values, new[1], whole(9, s.b, s.hk, s.n), 7,
    )  # fmt: skip


CALLS = {"eviction_slot": _evicted, "replace_token": _replaced}
