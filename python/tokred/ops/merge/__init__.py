"""Applying maps, and pooling over segments, runs and trees of tokens."""

from .ema_scan import ema_scan
from .forest import forest_merge, forest_roots
from .maps import compose, merge, unmerge
from .runs import AdjacentRuns, adjacent_runs
from .segments import segment_pool, segment_weights

__all__ = [
    "AdjacentRuns",
    "adjacent_runs",
    "compose",
    "ema_scan",
    "forest_merge",
    "forest_roots",
    "merge",
    "segment_pool",
    "segment_weights",
    "unmerge",
]
