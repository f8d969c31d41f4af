"""The options that every method has."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """prop_attn, trace_source, weighted_pool and num_prefix, as patch() documents them."""

    prop_attn: bool = True
    trace_source: bool = False
    weighted_pool: bool = False
    num_prefix: int | None = None
