"""A call of unmerged_attention."""

from __future__ import annotations

from ..sizes import random, whole

CALLS = {
    "unmerged_attention": lambda s: (
        random(s.b, s.hq, s.q, s.d), random(s.b, s.hk, s.m, s.d), random(s.b, s.hk, s.m, s.dv),
        whole(s.m, s.b, s.n), random(1, s.n, s.d // 2), random(1, s.n, s.d // 2), True, 0.5,
        whole(s.q, s.b, s.n),
    ),
}  # fmt: skip
