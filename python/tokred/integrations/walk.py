"""Walks over the modules of a model: where its lists of layers are, and what is around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn


def layer_lists(
    model: nn.Module, is_layer: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, list[nn.Module]]]:
    """(name, layers) of every Sequential or ModuleList of which all children are such layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module):
            layers = list(module)
            if all(is_layer(layer) for layer in layers):
                yield name, layers


def ancestors(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around `name`, from the innermost out, `model` last."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield model.get_submodule(".".join(parts[:length]))
    if name:
        yield model
