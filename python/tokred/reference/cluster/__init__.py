"""Grouping of tokens, and tokens that stand for others, in plain torch."""

from .connected_components import connected_components
from .greedy_select import greedy_select
from .kmeans import kmeans
from .kmedoids import kmedoids

__all__ = ["connected_components", "greedy_select", "kmeans", "kmedoids"]
