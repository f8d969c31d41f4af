"""Token reduction kernels: scoring, choosing, matching, merging, packing, sparse attention.

The functional API below calls torch.ops.tokred.*, on CPU and CUDA tensors. The same ops in plain
torch are in tokred.reference, attention modules in tokred.nn, the published methods in
tokred.methods, and `tokred.patch`, or `tokred.apply`, puts a method into a timm, transformers or
diffusers model.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _library

_library.load()

from .ops import (  # noqa: E402  (the ops must exist before their wrappers)
    PackedKV,
    PackFormat,
    Records,
    SimilarityStats,
    attention_columns,
    attention_rows,
    biased_attention,
    bipartite_soft_matching,
    block_pool,
    block_score,
    block_sparse_attention,
    combine_states,
    compact,
    compose,
    gather_tokens,
    inverse_transform_sample,
    kv_append,
    kv_pack,
    kv_unpack,
    match,
    merge,
    num_out,
    packed_attention,
    packed_qk_score,
    pagerank,
    qk_score,
    similarity_stats,
    sparse_attention,
    threshold_matching,
    topk,
    topk_with_counts,
    transition_stats,
    unmerge,
)

__version__ = "0.1.0"

__all__ = [
    "PackFormat",
    "PackedCache",
    "PackedKV",
    "Records",
    "SimilarityStats",
    "apply",
    "attention_columns",
    "attention_rows",
    "biased_attention",
    "bipartite_soft_matching",
    "block_pool",
    "block_score",
    "block_sparse_attention",
    "combine_states",
    "compact",
    "compose",
    "gather_tokens",
    "inverse_transform_sample",
    "kv_append",
    "kv_pack",
    "kv_unpack",
    "match",
    "merge",
    "num_out",
    "packed_attention",
    "packed_qk_score",
    "pagerank",
    "patch",
    "qk_score",
    "similarity_stats",
    "sparse_attention",
    "threshold_matching",
    "topk",
    "topk_with_counts",
    "transition_stats",
    "unmerge",
]

_LAZY_MODULES = ("cache", "integrations", "methods", "nn", "patching", "reference")


def __getattr__(name: str) -> Any:
    """Imports what is not needed to run an op when it is first asked for."""
    if name in ("apply", "patch"):
        return getattr(importlib.import_module("tokred.patching"), name)
    if name == "PackedCache":
        return importlib.import_module("tokred.cache").PackedCache
    if name in _LAZY_MODULES:
        return importlib.import_module(f"tokred.{name}")
    raise AttributeError(f"module 'tokred' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
