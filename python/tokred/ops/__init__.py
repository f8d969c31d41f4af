"""The functional API: one module per stem."""

from .match import bipartite_soft_matching, match, num_out, threshold_matching
from .merge import compose, merge, unmerge
from .sparse_attn import biased_attention

__all__ = [
    "biased_attention",
    "bipartite_soft_matching",
    "compose",
    "match",
    "merge",
    "num_out",
    "threshold_matching",
    "unmerge",
]
