"""Grouping of tokens: components, and clusters."""

from .connected_components import connected_components
from .kmeans import kmeans

__all__ = ["connected_components", "kmeans"]
