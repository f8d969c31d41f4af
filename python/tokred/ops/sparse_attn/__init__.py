"""Attention over a chosen part of the keys."""

from .biased_attention import biased_attention, combine_states
from .block_sparse_attention import block_sparse_attention
from .sparse_attention import sparse_attention
from .unmerged_attention import unmerged_attention

__all__ = [
    "biased_attention",
    "block_sparse_attention",
    "combine_states",
    "sparse_attention",
    "unmerged_attention",
]
