"""Caches of packed keys and values for transformers' models, which attention reads as they are."""

from .cache import PackedCache
from .layers import CacheBytes, PackedCacheLayer
from .storage import CacheOptions

__all__ = ["CacheBytes", "CacheOptions", "PackedCache", "PackedCacheLayer"]
