"""Tokens, heads and cached keys on several devices, with torch.distributed.

Importing this registers how the ops work on DTensors. The functions decode a sequence whose keys
are split over the ranks of a process group.
"""

from .context import combine_over_ranks, topk_over_ranks, votes_over_ranks
from .sharding import register

__all__ = ["combine_over_ranks", "register", "topk_over_ranks", "votes_over_ranks"]

register()
