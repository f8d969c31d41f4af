"""Importance and similarity of tokens, never N x N."""

from .attention_rows import attention_columns, attention_rows, pagerank
from .qk_score import block_pool, block_score, qk_score
from .similarity_stats import SimilarityStats, similarity_stats, transition_stats

__all__ = [
    "SimilarityStats",
    "attention_columns",
    "attention_rows",
    "block_pool",
    "block_score",
    "pagerank",
    "qk_score",
    "similarity_stats",
    "transition_stats",
]
