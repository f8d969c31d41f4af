"""transformers' language models: methods that keep fewer keys than there are tokens.

The model runs on tokred's attention (attention.py) inside the patch. When a forward pass brings a
cache without tokens, the layers of full attention get caches of their own (kept_keys.py), which ask
the method, a KeyEvictor, after each attention which keys stay. Methods count full-attention layers
only, from 0. Layers that see only a part of the keys are not touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tokred.compat import cache_keyword
from tokred.patching import KeyEvictor, Overrides, Settings
from tokred.patching.protocols import name_of

from . import attention
from .decoder import _decoder, _decoders, _numbers
from .full_attention import explain, full_attention
from .kept_keys import KeptKeysLayer
from .rotary import find_rotary

_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class Stack:
    """The full-attention modules of one decoder, and what is needed to put a method there.

    numbers: of their layers in a cache.
    """

    modules: list[nn.Module]
    numbers: list[int]
    decoder: nn.Module
    evictor: Any  # a KeyEvictor
    rotary: Any

    def install(self, method: Any, settings: Settings, overrides: Overrides) -> KeyEvictor:
        """Puts the method into the decoder; returns it."""
        # The attribute, as the property would set the configs of other parts of the model too.
        config = self.modules[0].config
        overrides.assign(config, "_attn_implementation_internal", attention.register())
        names = [*inspect.signature(type(self.decoder).forward).parameters][1:]
        place = next((n for n, name in enumerate(names) if name in _NAMES), None)
        overrides.replace(self.decoder, "forward", _decoder_forward, self, place)
        if hasattr(self.evictor, "attended"):
            for number, module in enumerate(self.modules):
                overrides.replace(module, "forward", _module_forward, self, number)
        return self.evictor

    def prepare(self, cache: Any) -> None:
        """Puts a KeptKeysLayer in the place of each full-attention layer of a cache.

        Raises:
            ValueError: a cache of another kind, or one with tokens from elsewhere.
        """
        name = name_of(self.evictor)
        layers = getattr(cache, "layers", None)
        if not isinstance(cache, Cache) or layers is None:
            raise ValueError(
                f"{name} works in a transformers.DynamicCache, got {type(cache).__name__}"
            )
        if cache.offloading:
            raise ValueError(f"{name} does not work in an offloaded cache: use a DynamicCache")
        if cache.layer_class_to_replicate is not None:
            while len(layers) <= max(self.numbers):
                layers.append(cache.layer_class_to_replicate())
        fresh = {}
        for place, number in enumerate(self.numbers):
            layer = layers[number]
            if isinstance(layer, KeptKeysLayer):
                same = layer.evictor is self.evictor or layer.evictor == self.evictor
                if same and layer.number == place:
                    continue
                if layer.get_seq_length() > 0:
                    raise ValueError(
                        f"the cache holds what {layer.evictor} has kept, and cannot go on with "
                        f"{self.evictor}: begin with a new cache"
                    )
            packing = getattr(layer, "packing", None)
            known = isinstance(layer, KeptKeysLayer) or getattr(layer, "is_dense", False)
            if packing is None and not known and type(layer) is not DynamicLayer:
                raise ValueError(
                    f"{name} keeps keys in a cache that grows, and this one has a "
                    f"{type(layer).__name__}: pass a DynamicCache, a tokred.DenseCache, a "
                    "tokred.PackedCache or none"
                )
            if packing is not None:
                _check_packing(name, packing)
            if layer.get_seq_length() > 0:
                raise ValueError(
                    f"the cache holds {layer.get_seq_length()} tokens from outside of the patch, "
                    f"whose attention {name} has not seen: begin with a new cache inside it"
                )
            fresh[number] = KeptKeysLayer(
                self.evictor, place, len(self.numbers), self.rotary, packing
            )
        for number, layer in fresh.items():
            layers[number] = layer


def stacks(model: nn.Module, method: Any, settings: Settings) -> Iterator[Stack]:
    """The decoders in the model.

    Raises:
        ValueError: options of token merging; a model with what a cache of fewer keys cannot serve.
    """
    for names in _decoders(full_attention(model)):
        modules = [model.get_submodule(name) for name in names]
        if settings != Settings():
            raise ValueError(
                "prop_attn, trace_source, weighted_pool and num_prefix are for methods that merge "
                "tokens; this one keeps fewer keys"
            )
        for module in modules:
            lack = _lacks(module)
            if lack:
                raise ValueError(
                    f"{type(module).__name__} {lack}: choose keys instead of evicting them, with "
                    "token_select or top_k_attention"
                )
        rotary = None
        if getattr(method, "reads_rotary", False):
            parameters = getattr(modules[0].config, "rope_parameters", None) or {}
            if "mrope_section" in parameters:
                raise ValueError(
                    f"{type(modules[0]).__name__} rotates by positions of several dimensions "
                    f"(M-RoPE), of which {name_of(method)} knows one: use snap_kv"
                )
            rotary = find_rotary(model, modules)
        numbers = _numbers(modules)
        yield Stack(modules, numbers, _decoder(model, names), method, rotary)


def _check_packing(name: str, packing: Any) -> None:
    """Refuses a packed cache from which single tokens cannot be evicted.

    Raises:
        ValueError: saying which option to change.
    """
    if packing.key_axis == "token":
        raise ValueError(
            f"{name} evicts single tokens, and this PackedCache packs the keys of neighbouring "
            "tokens together: make it with key_axis='channel'"
        )
    if packing.window > 0:
        raise ValueError(
            f"{name} leaves no last {packing.window} tokens that a window could hold in full "
            "precision: make the PackedCache with window=0"
        )


def why_not(model: nn.Module) -> str:
    """Why a model has no decoder that a method can be put into."""
    return explain(model)


def _lacks(module: nn.Module) -> str | None:
    """Why keys of the module cannot be evicted; None where they can."""
    config = module.config
    if getattr(config, "is_encoder_decoder", False):
        return "is of an encoder-decoder, whose cache is two"
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares its keys with other layers, which would miss what it evicts"
    if getattr(config, "kv_lora_rank", None):
        return "has multi-head latent attention, which computes with cached keys itself"
    if any(isinstance(getattr(module, name, None), nn.Parameter) for name in ("sinks", "sink")):
        return "has attention sinks that are no tokens, by which no attention is measured"
    return None


def _module_forward(
    stack: Stack, place: int, original: Callable, hidden_states: Any, *args: Any, **kwargs: Any
) -> Any:
    """The attention of a layer, after which a method that reads its input is called."""
    output = original(hidden_states, *args, **kwargs)
    cache = next((kwargs[name] for name in _NAMES if kwargs.get(name) is not None), None)
    if cache is not None:
        layer, module = cache.layers[stack.numbers[place]], stack.modules[place]
        given = {**kwargs, "hidden_states": hidden_states, "past_key_values": cache}
        rotary, evictor = getattr(stack.decoder, "rotary_emb", None), stack.evictor
        evictor.attended(module, layer, output[1], given, rotary)
    return output


def _decoder_forward(
    stack: Stack, place: int | None, original: Callable, *args: Any, **kwargs: Any
) -> Any:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name_of(stack.evictor)} keeps fewer keys in Python, which torch.compile does "
            "not follow: run the model without it"
        )
    positional = args[place] if place is not None and len(args) > place else None
    name = next((each for each in _NAMES if kwargs.get(each) is not None), None)
    cache = positional if name is None else kwargs[name]
    if cache is None:
        use = kwargs.get("use_cache")
        config = stack.modules[0].config
        use = getattr(config, "use_cache", True) if use is None else use
        if use and not torch.is_grad_enabled():
            cache = kwargs[cache_keyword()] = DynamicCache(config=config)
    if cache is not None:
        stack.prepare(cache)
    return original(*args, **kwargs)
