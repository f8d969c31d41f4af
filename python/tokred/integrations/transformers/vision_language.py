"""transformers' vision-language models: methods that give the language model fewer visual tokens.

One adapter for all of them, by their structure: a core model has get_image_features and a language
model, and takes what the former returned as mm_encoder_outputs. Before the core runs, a method
chooses among each image's tokens; the prompt is rewritten without the placeholders of the others
(ids, masks, token types, positions), and the model does the rest itself: it checks the
placeholders, builds its masks and feeds deepstack features as ever. Decoding goes on from what the
cache knows of its prompt (prompt_rows.py). Pruning between layers is in prompt_layers.py.

What comes back has as many positions as the shortened prompt has.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokred.patching import Overrides, Settings

from .attention_tap import record, tap
from .encoder_states import Seen, images_of, pack_maps
from .full_attention import dispatches
from .prompt_layers import LayerPruning
from .prompt_rows import Prompt, recall, remember
from .visual_prompt import STATES, Prefill, VisualState

_LANGUAGE = ("language_model", "text_model")
_ENCODERS = ("vision_tower", "visual", "vision_model")
# Arguments with a value for every token, in the last dimension.
_OF_TOKENS = {"input_ids", "position_ids", "token_type_ids", "mm_token_type_ids"}
_PROJECTORS = ("multi_modal_projector", "connector", "merger")


def _named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def _part(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The child of one of these names."""
    return next((module._modules[n] for n in names if module._modules.get(n) is not None), None)


class _Running(threading.local):
    seen: Seen | None = None


_running = _Running()


@dataclass(frozen=True)
class Stack:
    """A core model, and the modules around it that compute a loss."""

    core: nn.Module
    around: list[nn.Module]

    def install(self, method: Any, settings: Settings, overrides: Overrides) -> VisualState:
        """Puts the method into the model; returns its state."""
        core = self.core
        encoder = _part(core, _ENCODERS)
        modules = [] if encoder is None else [m for m in encoder.modules() if dispatches(m)]
        chosen = _encoder_layers(method, len(modules))
        recorded = [modules[layer] for layer in chosen]
        layers = None
        if hasattr(method, "prune_layers"):
            layers = LayerPruning(method, _part(core, _LANGUAGE))
            layers.install(overrides)
        state = VisualState(core, method, modules, recorded, layers)
        if recorded:
            tap(recorded, overrides)
        projector = _projector(core)
        if projector is not None:
            overrides.pre_hook(projector, _keep_projected)
        if hasattr(core, "pack_image_features"):
            overrides.replace(core, "pack_image_features", _pack, core)
        if hasattr(encoder, "permute_input_for_window_attn"):
            overrides.replace(encoder, "permute_input_for_window_attn", _permute)
        overrides.replace(core, "get_image_features", _image_features, state)
        overrides.replace(core, "forward", _forward, state)
        for module in self.around:
            overrides.replace(module, "forward", _refuse_labels, module)
        return state


def stacks(model: nn.Module, method: Any, settings: Settings) -> Iterator[Stack]:
    """The core models in the model.

    Raises:
        ValueError: options of token merging; options that do not fit the number of layers; a model
            that the method cannot be put into.
    """
    for name, core in model.named_modules():
        if not _is_core(core):
            continue
        if settings != Settings():
            raise ValueError(
                "prop_attn, trace_source, weighted_pool and num_prefix are for methods that merge "
                "tokens inside an encoder; this one chooses visual tokens"
            )
        if "mm_encoder_outputs" not in inspect.signature(core.forward).parameters:
            raise ValueError(
                f"{type(core).__name__} of this release of transformers does not take "
                "mm_encoder_outputs, by which visual tokens are handed over"
            )
        if hasattr(method, "prune_layers"):
            LayerPruning(method, _part(core, _LANGUAGE))
        encoder = _part(core, _ENCODERS)
        if encoder is not None:
            _encoder_layers(method, sum(dispatches(m) for m in encoder.modules()))
        parts = name.split(".") if name else []
        outer = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        around = [m for m in outer if "labels" in inspect.signature(m.forward).parameters]
        yield Stack(core, around)


def why_not(model: nn.Module) -> str:
    """Why there are no stacks in a model."""
    if any(hasattr(m, "get_image_features") for m in model.modules()):
        return "no part of it has get_image_features and a language_model of its own"
    return "nothing in it has get_image_features"


def _is_core(module: nn.Module) -> bool:
    # Two towers, such as CLIP's, have features of texts too: no token of one reaches the other.
    two_towers = hasattr(module, "get_text_features")
    has_features = hasattr(module, "get_image_features") and not two_towers
    return has_features and _part(module, _LANGUAGE) is not None


def _encoder_layers(method: Any, count: int) -> list[int]:
    """The numbers of the encoder's layers that the method reads."""
    if not hasattr(method, "reduce_visual"):
        return []
    asked = method.encoder_layers(count)
    for layer in asked:
        if not -count <= layer < count:
            raise ValueError(
                f"the method reads layer {layer} of the vision encoder, which has {count} layers "
                "whose attention can be read"
            )
    return sorted({layer % count for layer in asked})


def _projector(core: nn.Module) -> nn.Module | None:
    projector = _part(core, _PROJECTORS)
    encoder = _part(core, _ENCODERS)
    return _part(encoder, _PROJECTORS) if projector is None and encoder is not None else projector


# What the vision encoder leaves behind.


def _keep_projected(module: nn.Module, args: tuple, kwargs: dict) -> None:
    if _running.seen is not None:
        given = args[0] if args else next(iter(kwargs.values()))
        _running.seen.projected = given.detach()


def _pack(core: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    if _running.seen is not None:
        pack_maps(core, original, args, kwargs, _running.seen)
    return original(*args, **kwargs)


def _permute(original: Callable, x: Tensor, window_index: Tensor, *args: Any, **kw: Any) -> Tensor:
    if _running.seen is not None:
        _running.seen.window_index = window_index
    return original(x, window_index, *args, **kw)


def _image_features(state: VisualState, original: Callable, *args: Any, **kwargs: Any) -> Any:
    """get_image_features, whose result also has its images as the method will be given them."""
    given = _named(original, args, kwargs)
    outer = _running.seen
    try:
        with record(state.recorded) as recording:
            seen = _running.seen = Seen(state.modules, recording.calls)
            outputs = original(*args, **kwargs)
    finally:
        _running.seen = outer
    if not isinstance(outputs, tuple):
        pixels, grids = given["pixel_values"], given.get("image_grid_thw")
        projector = _part(state.core, _PROJECTORS)
        images = images_of(state.core, outputs, pixels, grids, seen, projector)
        setattr(outputs, STATES, images)
    return outputs


# A forward pass of the core.


def _refuse_labels(module: nn.Module, original: Callable, *args: Any, **kwargs: Any) -> Any:
    given = _named(original, args, kwargs)
    images = given.get("pixel_values") is not None or given.get("mm_encoder_outputs") is not None
    if given.get("labels") is not None and images:
        raise ValueError(
            "labels belong to all tokens of the prompt, of which the method drops some: compute "
            "the loss from the logits"
        )
    if isinstance(given.get("logits_to_keep"), Tensor) and images:
        raise ValueError(
            "logits_to_keep must be an int, as positions of the whole prompt are not those of the "
            "tokens that stay"
        )
    return original(*args, **kwargs)


def _forward(state: VisualState, original: Callable, *args: Any, **kwargs: Any) -> Any:
    given = _named(original, args, kwargs)
    if given.get("past_key_values") is not None:
        given["cache"] = given.pop("past_key_values")
    encoded = given.get("mm_encoder_outputs")
    if encoded is not None and not isinstance(encoded, dict):
        raise ValueError("mm_encoder_outputs must be a dict of what get_image_features returned")
    encoded = dict(encoded or {})
    if given.get("pixel_values_videos") is not None or encoded.get("video") is not None:
        raise ValueError(
            "videos are not served by this patch: images alone, or patch the frames as images"
        )
    cache = given.get("cache")
    prompt = None if cache is None else recall(cache)
    pixels = given.get("pixel_values")
    has_images = encoded.get("image") is not None or (pixels is not None and len(pixels) > 0)
    if not has_images:
        if prompt is None:
            return original(**given)
        return _go_on(state, prompt, original, given)
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "images can only be read into an empty cache: pass the whole conversation with a new "
            "one"
        )
    if cache is not None and cache.is_compileable:
        raise ValueError(
            f"{type(cache).__name__} has places for the whole prompt: use the default DynamicCache"
        )
    if given.get("input_ids") is None:
        raise ValueError(
            "pass input_ids, not inputs_embeds: placeholders of images are found there"
        )
    if encoded.get("image") is None:
        names = inspect.signature(state.core.get_image_features).parameters
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        encoded["image"] = state.core.get_image_features(**inputs, return_dict=True)
    given["pixel_values"] = None
    given["mm_encoder_outputs"] = encoded
    return Prefill(state, original, given).run()


def _go_on(state: VisualState, prompt: Prompt, original: Callable, given: dict) -> Any:
    """A forward pass of tokens behind a prompt that was shortened."""
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    batch, queries = tokens.shape[:2]
    if batch != prompt.kept.source.shape[0]:
        raise ValueError(
            f"the cache holds prompts of {prompt.kept.source.shape[0]} rows, got {batch}"
        )
    cache, before = given["cache"], prompt.cached - prompt.places
    if prompt.stages and state.layers is None:
        raise ValueError(
            "the layers of the cache have different lengths, as a method that prunes between them "
            "left it: go on inside its patch"
        )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask must be [B, tokens] behind a prompt that was shortened")
    known = prompt.length + before
    if mask is not None and known < mask.shape[1] < known + queries:
        # generate goes by the length of the cache, and passes the tokens again that it lacks.
        queries = mask.shape[1] - known
        for name in _OF_TOKENS & given.keys():
            if given[name] is not None:
                given[name] = given[name][..., -queries:]
        if given.get("inputs_embeds") is not None:
            given["inputs_embeds"] = given["inputs_embeds"][:, -queries:]
    if mask is not None and mask.shape[1] != known + queries:
        raise ValueError(
            f"attention_mask must have the prompt's {prompt.length} tokens and the "
            f"{before + queries} behind it, got {mask.shape[1]}"
        )
    if prompt.last is not None:
        if mask is not None or not prompt.kept.whole:
            valid = prompt.kept.valid
            if mask is None:
                tail = valid.new_ones(batch, before + queries).long()
            else:
                tail = mask[:, prompt.length :]
            given["attention_mask"] = torch.cat([valid.to(tail.dtype), tail], 1)
        step = torch.arange(1 + before, 1 + before + queries, device=prompt.last.device)
        given["position_ids"] = prompt.last[..., None] + step
    pruning = state.layers
    if pruning is None:
        output = original(**given)
    else:
        with pruning.after(prompt, before, queries):
            output = original(**given)
    # A copy of the cache goes on by itself.
    after = copy.copy(prompt)
    after.cached += queries
    remember(cache, after)
    return output
