"""Applying maps, and pooling over segments of tokens."""

from .maps import compose, merge, unmerge
from .segments import segment_pool, segment_weights

__all__ = ["compose", "merge", "segment_pool", "segment_weights", "unmerge"]
