"""Conditions on sizes that may be known only when an exported or compiled graph runs."""

from __future__ import annotations

import torch


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for certain; False where only the graph's run will tell.

    Without a graph it is the condition itself. Inside one, whatever the answer leads to must be
    right for all sizes, or be refused by the op when it runs.
    """
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        return torch.fx.experimental.symbolic_shapes.guard_or_false(condition)
    return condition
