"""Clusters of tokens, and selections of tokens that represent the others."""

from .connected_components import connected_components
from .dpc_knn import dpc_knn
from .greedy_select import greedy_select
from .kmeans import kmeans
from .kmedoids import kmedoids
from .knn_reconstruct import knn_reconstruct
from .local_soft_kmeans import local_soft_kmeans

__all__ = [
    "connected_components",
    "dpc_knn",
    "greedy_select",
    "kmeans",
    "kmedoids",
    "knn_reconstruct",
    "local_soft_kmeans",
]
