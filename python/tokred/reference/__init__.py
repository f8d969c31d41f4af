"""The ops in plain torch, at the precision of their inputs: the oracle of the tests.

Written to be read, not to be fast. Half-precision inputs are computed in float32 and the results
rounded once; float64 inputs are computed in float64 throughout.
"""

from .kv_pack import kv_append, kv_pack, kv_unpack
from .match import bipartite_soft_matching, match, threshold_matching
from .merge import compose, merge, unmerge
from .packed_attn import packed_attention, packed_qk_score
from .score import (
    attention_columns,
    attention_rows,
    block_pool,
    block_score,
    pagerank,
    qk_score,
    similarity_stats,
    transition_stats,
)
from .sparse_attn import (
    biased_attention,
    block_sparse_attention,
    combine_states,
    sparse_attention,
)
from .topk import (
    compact,
    gather_tokens,
    inverse_transform_sample,
    topk,
    topk_with_counts,
)

__all__ = [
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
    "packed_attention",
    "packed_qk_score",
    "pagerank",
    "qk_score",
    "similarity_stats",
    "sparse_attention",
    "threshold_matching",
    "topk",
    "topk_with_counts",
    "transition_stats",
    "unmerge",
]
