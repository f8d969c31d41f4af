"""The functional API: one module per stem."""

from .kv_pack import PackedKV, PackFormat, Records, kv_append, kv_pack, kv_unpack
from .match import bipartite_soft_matching, match, num_out, threshold_matching
from .merge import compose, merge, unmerge
from .packed_attn import packed_attention, packed_qk_score
from .score import block_pool, block_score, qk_score
from .score_attention import attention_columns, attention_rows, pagerank
from .score_similarity import SimilarityStats, similarity_stats, transition_stats
from .sparse_attn import biased_attention, combine_states
from .sparse_attn_blocks import block_sparse_attention
from .sparse_attn_lists import sparse_attention
from .topk import compact, gather_tokens, inverse_transform_sample, topk, topk_with_counts

__all__ = [
    "PackFormat",
    "PackedKV",
    "Records",
    "SimilarityStats",
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
    "qk_score",
    "similarity_stats",
    "sparse_attention",
    "threshold_matching",
    "topk",
    "topk_with_counts",
    "transition_stats",
    "unmerge",
]
