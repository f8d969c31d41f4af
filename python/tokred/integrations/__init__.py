"""Integrations: where in a library's models the layers are, and how a method gets into them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import nn

from tokred.compat import advice

if TYPE_CHECKING:
    from tokred.patching import Settings

# The module of each adapter, and the models that it finds layers in.
_ADAPTERS = {
    "timm": ("timm", "timm models made of vision_transformer.Block"),
    "transformers": (
        "transformers.encoder",
        "transformers' ViT, DINOv2, SigLIP, CLIP, BERT and what is built of such layers",
    ),
    "diffusers": ("diffusers", "diffusers models made of BasicTransformerBlock"),
    "causal_lm": (
        "transformers.decoder",
        "transformers' language models with full causal attention",
    ),
    "causal_lm_cache": (
        "transformers.eviction",
        "transformers' language models with full causal attention",
    ),
    "vision_language": (
        "transformers.vision_language",
        "transformers' vision-language models, from LLaVA and Qwen2-VL on",
    ),
}


def find(model: nn.Module, method: Any, settings: Settings) -> list[Any]:
    """The stacks of layers in the model that the method can be put into, by its `adapters`.

    Each has install(method, settings, overrides), which does so and returns the stack's state.

    Raises:
        ValueError: there are none, or one that cannot be served; the message says why, as far as it
            is known.
    """
    stacks: list[Any] = []
    reasons = []
    for name in method.adapters:
        try:
            adapter = importlib.import_module(f"{__name__}.{_ADAPTERS[name][0]}")
        except ModuleNotFoundError as error:
            if (missing := advice(error)) is None:
                raise
            reasons.append(missing)
            continue
        stacks += adapter.stacks(model, method, settings)
        if stacks and name == "vision_language":
            break  # the model's vision encoder is part of what has been found
        if hasattr(adapter, "why_not"):
            reasons.append(adapter.why_not(model))
    if not stacks:
        supported = "; ".join(_ADAPTERS[name][1] for name in method.adapters)
        why = "".join(f" ({reason})" for reason in reasons if reason)
        raise ValueError(
            f"{type(model).__name__} has no layer that this method can be put into"
            f"{why}; supported are: {supported}"
        )
    return stacks
