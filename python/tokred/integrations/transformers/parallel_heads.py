"""Tensor parallelism: which processes have the other heads of an attention module."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn


def other_heads(module: nn.Module, heads: int) -> Any:
    """The group of the ranks among which the heads of a module are split.

    Args:
        module: with the config of the whole model, its weights perhaps DTensors.
        heads: of queries, in this process.

    Returns:
        None where all heads are here; "unknown" where some are not, and the weights do not say on
        which ranks the others are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if heads == getattr(getattr(module, "config", None), "num_attention_heads", heads):
        return None
    from torch.distributed.tensor import DTensor, Shard

    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            split = [n for n, placed in enumerate(parameter.placements) if placed == Shard(0)]
            if len(split) == 1:
                return parameter.device_mesh.get_group(split[0])
    return "unknown"
