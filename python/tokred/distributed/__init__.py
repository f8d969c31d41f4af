"""Tokens, heads and cached keys on several devices, with torch.distributed.

Importing this registers how the ops work on DTensors. The functions decode a sequence whose keys
are split over the ranks of a process group.
"""

from .context import combine_over_ranks, topk_over_ranks, votes_over_ranks

__all__ = ["combine_over_ranks", "register", "topk_over_ranks", "votes_over_ranks"]

try:
    from .sharding import register

    register()
except (ImportError, AttributeError) as error:  # torch has no public interface for such rules
    _missing = str(error)

    def register() -> None:
        """Says why the ops have no rules for DTensors here; all else works.

        Raises:
            RuntimeError: this torch does not have the interface that the rules are written for.
        """
        raise RuntimeError(
            f"tokred's ops do not work on DTensors with this torch, which has changed how ops say "
            f"where their results are ({_missing}): call them on local tensors, in local_map"
        )
