"""Differences between releases of other packages that tokred supports, all in one place."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any


def release(package: str) -> tuple[int, int]:
    """The first two numbers of an installed package's version."""
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


# Packages that an extra of the same name installs.
_EXTRAS = ("transformers", "timm", "diffusers")


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that is missing; None where no extra has it."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return f"{package} is not installed: pip install 'tokred[{package}]'"


def cache_keyword() -> str:
    """The cache's name in `forward` and `generate`: `past_key_values` before transformers 5.24."""
    return "cache" if release("transformers") >= (5, 24) else "past_key_values"


def has_flat_dinov2() -> bool:
    """Whether DINOv2's attention holds its projections itself, as from transformers 5.18 on."""
    return release("transformers") >= (5, 18)


def forward_checkpoints(layer: type) -> bool:
    """Whether a transformers layer checkpoints its gradients in `forward`.

    Before transformers 5.24 `__call__` does it, around whatever `forward` is set to.
    """
    bases = [kind for kind in layer.__mro__ if kind.__name__ == "GradientCheckpointingLayer"]
    return any("__init_subclass__" in vars(kind) for kind in bases)


def drop_tokens(layer: Any) -> None:
    """Takes the tokens of a transformers DynamicLayer; its `reset` then resets the rest.

    In older releases (5.17 is one) `reset` alone sets keys and values to zero but keeps them, so
    that later queries would attend to zeros.
    """
    layer.keys = layer.values = None
    layer.is_initialized = False
