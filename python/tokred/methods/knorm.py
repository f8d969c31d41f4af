"""Knorm: each head keeps the keys of smallest norm, which attract most attention.

A Simple and Effective L_2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430).

No query is looked at. The first layers, where small norms do not go with attention, keep all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.linalg import vector_norm

from ._eviction import check_budget
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


@dataclass(frozen=True)
class KnormOptions(Options):
    """Options of tokred.patch(model, "knorm", ...).

    budget: tokens that every head keeps. skipped: the first layers, which keep all.
    """

    budget: int = 1024
    skipped: int = 2

    adapters = ("causal_lm_cache",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skipped < 0:
            raise ValueError(f"skipped must be at least 0, got {self.skipped}")
        check_budget(self.budget, 1, "a token")

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The keys of smallest norm."""
        if call.layer < self.skipped:
            return None
        norm = call.known("norm", vector_norm(call.new_k, dim=3, dtype=torch.float32))
        if call.is_one_over(self.budget):
            return call.drop(norm, "norm", largest=True)
        return call.best(-norm, self.budget, norm=norm)


METHOD = Method(
    title="A Simple and Effective L_2 Norm-Based Strategy for KV Cache Compression",
    arxiv="2406.11430",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="each head keeps the keys of smallest norm",
    options=KnormOptions,
)
