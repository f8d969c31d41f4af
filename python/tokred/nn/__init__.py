"""Attention modules over fewer keys, tokens or bits, for models of one's own.

`TopKAttention`, `BlockSparseAttention`, `MergedAttention` and `PackedKVAttention` stand in for
nn.MultiheadAttention, with its parameters. The cores inside them take q, k and v in heads, as
scaled_dot_product_attention does, for a model that has its own projections.
"""

from .multihead import BlockSparseAttention, MergedAttention, PackedKVAttention, TopKAttention
from .reduced import MergedCore, PackedKVCore
from .sparse import BlockSparseCore, TopKCore

__all__ = [
    "BlockSparseAttention",
    "BlockSparseCore",
    "MergedAttention",
    "MergedCore",
    "PackedKVAttention",
    "PackedKVCore",
    "TopKAttention",
    "TopKCore",
]
