"""Grouping of tokens, in plain torch."""

from .connected_components import connected_components
from .kmeans import kmeans

__all__ = ["connected_components", "kmeans"]
