"""Bipartite matching: of best partners, of token maps, one to one."""

from .linear_assignment import LinearAssignment, linear_assignment
from .matching import bipartite_soft_matching, match, num_out, threshold_matching
from .sinkhorn import Sinkhorn, sinkhorn

__all__ = [
    "LinearAssignment",
    "Sinkhorn",
    "bipartite_soft_matching",
    "linear_assignment",
    "match",
    "num_out",
    "sinkhorn",
    "threshold_matching",
]
