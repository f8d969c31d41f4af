"""The ops in plain torch, at the precision of their inputs: the oracle of the tests.

Written to be read, not to be fast. Half-precision inputs are computed in float32 and the results
rounded once; float64 inputs are computed in float64 throughout.
"""

from .match import bipartite_soft_matching, match, threshold_matching
from .merge import compose, merge, unmerge
from .sparse_attn import biased_attention

__all__ = [
    "biased_attention",
    "bipartite_soft_matching",
    "compose",
    "match",
    "merge",
    "threshold_matching",
    "unmerge",
]
