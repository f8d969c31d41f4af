"""Integrations: where in a library's models the layers are, and how a method gets into them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tokred.patching import Overrides, Settings

# The module of each adapter, and the models that it finds layers in.
_ADAPTERS = {
    "timm": ("timm", "timm models made of vision_transformer.Block"),
    "transformers": (
        "transformers.vision",
        "transformers' ViT, DeiT, DINOv2, SigLIP and CLIP vision models",
    ),
    "diffusers": ("diffusers", "diffusers models made of BasicTransformerBlock"),
    "causal_lm": (
        "transformers.decoder",
        "transformers' language models with full causal attention",
    ),
}


def attach(
    model: nn.Module,
    method: Any,
    settings: Settings,
    overrides: Overrides,
    check_only: bool = False,
) -> list[Any]:
    """Installs the method into every stack of layers that its adapters find in the model.

    Returns:
        One state per stack (none with check_only, which installs nothing).

    Raises:
        ValueError: no adapter finds a layer; the message says why, as far as it is known.
    """
    states = []
    found = False
    reasons = []
    for name in method.adapters:
        adapter = importlib.import_module(f"{__name__}.{_ADAPTERS[name][0]}")
        for stack in adapter.stacks(model, method, settings):
            found = True
            if not check_only:
                states.append(stack.install(method, settings, overrides))
        if hasattr(adapter, "why_not"):
            reasons.append(adapter.why_not(model))
    if not found:
        supported = "; ".join(_ADAPTERS[name][1] for name in method.adapters)
        why = "".join(f" ({reason})" for reason in reasons if reason)
        raise ValueError(
            f"{type(model).__name__} has no layer that this method can be put into"
            f"{why}; supported are: {supported}"
        )
    return states


def layer_lists(model: nn.Module, is_layer: Any) -> Iterator[tuple[str, list[nn.Module]]]:
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
