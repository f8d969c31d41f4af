"""What differs between the releases that tokred serves, in one place."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch


def release(package: str) -> tuple[int, int]:
    """The first two numbers of an installed package's version."""
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def cache_keyword() -> str:
    """The cache's name in `forward` and `generate`: `past_key_values` before transformers 5.24."""
    return "cache" if release("transformers") >= (5, 24) else "past_key_values"


def forward_checkpoints(layer: Any) -> bool:
    """Whether a transformers layer's own `forward`, called now, would checkpoint its gradients.

    Before transformers 5.24 it was `__call__` that did, around whatever `forward` was set to.
    """
    in_forward = hasattr(type(layer).forward, "__wrapped__")
    return (
        in_forward and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    )
