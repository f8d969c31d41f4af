"""Finds the attention modules that are causal over all keys, where a method can choose keys.

They are found by what they do, not by their names: they call transformers' attention interface, and
their config says which layers see a part of the keys only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType

from torch import nn
from transformers import modeling_utils

# What config.layer_types calls layers that attend to everything before them.
_FULL = ("full_attention", "attention", "hybrid", "global")
_LISTS = ("indices", "block_indices")


def full_attention(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by name, in the order of the model.

    Raises:
        ValueError: tokred's attention lacks something that a module beside them needs.
    """
    causal = {name: m for name, m in model.named_modules() if _is_causal(m) and dispatches(m)}
    found = {name: module for name, module in causal.items() if _limit(module) is None}
    configs = {id(module.config) for module in found.values()}
    for module in causal.values():
        lacks = _lacks(module)
        if id(module.config) in configs and lacks:
            raise ValueError(
                f"{type(module).__name__} {lacks}, which tokred's attention does not have: no "
                f"method can be put into {type(model).__name__}"
            )
    return found


def explain(model: nn.Module) -> str:
    """Why full_attention finds nothing."""
    reasons: dict[str, None] = {}
    for module in model.modules():
        if _is_causal(module):
            limit = _limit(module)
            if not dispatches(module):
                limit = "does not call transformers' attention interface"
            reasons[f"{type(module).__name__} {limit}"] = None
    return ", ".join(reasons) or "no causal attention calls transformers' attention interface"


def _is_causal(module: nn.Module) -> bool:
    """Whether it is causal attention with a place in the cache; of other models' too."""
    layer = getattr(module, "layer_idx", None)
    return (
        getattr(module, "is_causal", False) is True
        and isinstance(layer, int)
        and not isinstance(layer, bool)
        and hasattr(module, "config")
    )


def _forwards(module: nn.Module) -> Iterator[FunctionType]:
    """The functions that make up its forward, those of base classes included."""
    for kind in type(module).__mro__:
        function = inspect.unwrap(vars(kind).get("forward", nn.Module.forward))
        if kind is not nn.Module and isinstance(function, FunctionType):
            yield function


def dispatches(module: nn.Module) -> bool:
    """Whether its forward calls what is registered with transformers."""
    interface = modeling_utils.ALL_ATTENTION_FUNCTIONS
    return any(
        function.__globals__.get(name) is interface
        for function in _forwards(module)
        for name in function.__code__.co_names
    )


def _passes(module: nn.Module, keyword: str) -> bool:
    """Whether its forward passes something on by that keyword."""
    for function in _forwards(module):
        for constant in function.__code__.co_consts:
            if keyword == constant or (isinstance(constant, tuple) and keyword in constant):
                return True
    return False


def _limit(module: nn.Module) -> str | None:
    """What keeps the layer from seeing all keys; None where nothing does."""
    if hasattr(module, "indexer") or any(_passes(module, name) for name in _LISTS):
        return "brings lists of keys"
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and 0 <= module.layer_idx < len(kinds):
        kind = kinds[module.layer_idx]
        return None if kind in _FULL else f"is {kind}"
    for holder in (module, module.config):
        if getattr(holder, "sliding_window", None) is not None:
            return f"has a sliding window of {holder.sliding_window}"
    return None


def _lacks(module: nn.Module) -> str | None:
    """What the module needs and tokred's attention lacks; None where there is nothing."""
    if _passes(module, "position_bias"):
        return "adds a position bias to the logits"
    if _passes(module, "block_indices"):
        return "attends to lists of blocks"
    parameters = inspect.signature(type(module).forward).parameters.values()
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        return "takes no further arguments for its attention"
    return None
