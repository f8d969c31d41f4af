"""Finds the attention modules that are causal over all keys, where a method can choose keys.

They are found by what they do, not by their names: they call transformers' attention interface, and
their config says which layers see a part of the keys only.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn
from transformers import modeling_utils

# What config.layer_types calls layers that attend to everything before them.
_FULL = ("full_attention", "attention", "hybrid", "global")
_LISTS = ("indices", "block_indices")
_NO_INTERFACE = "does not call transformers' attention interface"
_MAX_HEAD_DIM = 256  # of scores, and of packed keys


def full_attention(model: nn.Module, chooses: bool = True) -> dict[str, nn.Module]:
    """The modules by name, in the order of the model.

    Args:
        chooses: whether keys are chosen there, and not all attended to.

    Raises:
        ValueError: tokred's attention lacks something that a module beside them needs.
    """
    generates = _generates(model)
    causal = {
        name: module
        for name, module in model.named_modules()
        if _is_causal(module, generates) and dispatches(module)
    }
    found = {name: module for name, module in causal.items() if _limit(module) is None}
    configs = {id(module.config) for module in found.values()}
    for module in causal.values():
        lacks = _lacks(module, chooses)
        if id(module.config) in configs and lacks:
            raise ValueError(
                f"{type(module).__name__} {lacks}: no method can be put into {type(model).__name__}"
            )
    return found


def explain(model: nn.Module) -> str:
    """Why full_attention finds nothing."""
    reasons: dict[str, None] = {}
    others: dict[str, None] = {}
    generates = _generates(model)
    for module in model.modules():
        name = type(module).__name__
        if _is_causal(module, generates):
            limit = _limit(module) if dispatches(module) else _NO_INTERFACE
            reasons[f"{name} {limit}"] = None
        elif "Attention" in name and type(module).forward is not nn.Module.forward:
            limit = "is not causal" if dispatches(module) else _NO_INTERFACE
            others[f"{name} {limit}"] = None
    return ", ".join(reasons or list(others)[:3]) or "it has no attention"


def looks_both_ways(config: Any) -> bool:
    """Whether attention under causal masks says that it is not causal: a prompt's first tokens see
    one another, as PaliGemma's do, which the masks then say."""
    return getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _generates(model: nn.Module) -> bool:
    """Whether it, or a part of it, generates text."""
    return any(getattr(m, "can_generate", bool)() for m in model.modules())


def _is_causal(module: nn.Module, generates: bool) -> bool:
    """Whether it is causal attention with a place in the cache; of other models' too."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or isinstance(layer, bool) or not hasattr(module, "config"):
        return False
    causal = getattr(module, "is_causal", None)
    return causal is True or (causal is False and generates and looks_both_ways(module.config))


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


def reads_cache_itself(module: nn.Module) -> bool:
    """Whether it appends to a cache, and then attends without what is registered."""
    if not any(isinstance(vars(module).get(name), int) for name in ("layer_idx", "layer_id")):
        return False
    appends = any("update" in function.__code__.co_names for function in _forwards(module))
    return appends and not dispatches(module)


def _passes(module: nn.Module, keyword: str) -> bool:
    """Whether its forward passes something on by that keyword."""
    for function in _forwards(module):
        for constant in function.__code__.co_consts:
            if keyword == constant or (isinstance(constant, tuple) and keyword in constant):
                return True
    return False


def _limit(module: nn.Module) -> str | None:
    """Why the layer does not see all keys; None where it does."""
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


def _lacks(module: nn.Module, chooses: bool) -> str | None:
    """A feature that the module needs and tokred's attention lacks; None where it has all."""
    unknown = ", which tokred's attention does not have"
    if chooses and _passes(module, "position_bias"):
        return "adds a position bias to the logits, which methods do not choose keys by"
    if _passes(module, "block_indices"):
        return f"attends to lists of blocks{unknown}"
    for name in ("head_dim", "qk_head_dim", "v_head_dim"):
        dim = getattr(module, name, None)
        if isinstance(dim, int) and dim > _MAX_HEAD_DIM:
            return (
                f"has heads of {dim} dimensions, above {_MAX_HEAD_DIM}, which methods and packed "
                "caches do not take"
            )
    parameters = inspect.signature(type(module).forward).parameters.values()
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        return f"takes no further arguments for its attention{unknown}"
    return None
