"""Caches for transformers' models: of a few bits, which attention reads as they are, and dense."""

from .base import CacheBytes
from .cache import PackedCache
from .dense import DenseCache, DenseCacheLayer
from .layers import PackedCacheLayer
from .storage import CacheOptions

__all__ = [
    "CacheBytes",
    "CacheOptions",
    "DenseCache",
    "DenseCacheLayer",
    "PackedCache",
    "PackedCacheLayer",
]
