"""The options that every method has."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """What patch() documents under these names."""

    prop_attn: bool = True
    trace_source: bool = False
    weighted_pool: bool = False
    num_prefix: int | None = None
    restore_tokens: bool | None = None
