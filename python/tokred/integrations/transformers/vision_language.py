"""transformers' vision-language models: methods that give the language model fewer visual tokens.

One adapter for all of them, by their structure: a core model has get_image_features and a language
model, and takes what the former returned as mm_encoder_outputs. Before the core runs, a method
chooses among each image's tokens; the prompt is rewritten without the placeholders of the others
(ids, masks, token types, positions), and the model does the rest itself: it checks the
placeholders, builds its masks and feeds deepstack features as ever. Decoding goes on from what the
cache knows of its prompt (prompt_rows.py). Methods that prune between layers are in prompt_layers.py.

What comes back has as many positions as the shortened prompt has.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from tokred.patching import Overrides, Settings, VisualCall, VisualTokens
from tokred.patching.recomputation import PerThread

from .attention_tap import record, tap
from .encoder_states import Image, Seen, images_of, pack_maps
from .full_attention import dispatches
from .prompt_layers import LayerPruning
from .prompt_rows import Kept, Prompt, keep_in_order, recall, remember

_LANGUAGE = ("language_model", "text_model")
_ENCODERS = ("vision_tower", "visual", "vision_model")
_PROJECTORS = ("multi_modal_projector", "connector", "merger")
_STATES = "tokred_images"


def _named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


def _part(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The child of one of these names."""
    return next((module._modules[n] for n in names if module._modules.get(n) is not None), None)


@dataclass
class _Latest:
    """What the calling thread's latest prompt came to, and what runs in it now."""

    counts: tuple[tuple[int, int], ...] | None = None


class _Running(threading.local):
    seen: Seen | None = None


_running = _Running()


@dataclass
class VisualState:
    """A method in one core model. counts: (tokens, tokens kept) of each image in the prompt that
    the calling thread has run last, in the order of the rows, before any layer of the language
    model; placeholders of newlines included."""

    core: nn.Module
    method: Any
    modules: list[nn.Module]
    recorded: list[nn.Module]
    layers: LayerPruning | None
    _latest: PerThread = field(default_factory=lambda: PerThread(_Latest))

    @property
    def counts(self) -> tuple[tuple[int, int], ...]:
        counts = self._latest.own.counts
        if counts is None:
            raise RuntimeError("no prompt with images has run inside the patch in this thread yet")
        return counts


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
    return hasattr(module, "get_image_features") and _part(module, _LANGUAGE) is not None


def _encoder_layers(method: Any, count: int) -> list[int]:
    """The numbers of the encoder's layers that the method reads."""
    if not hasattr(method, "reduce_visual"):
        return []
    chosen = [layer + count if layer < 0 else layer for layer in method.encoder_layers(count)]
    for layer in chosen:
        if not 0 <= layer < count:
            raise ValueError(
                f"the method reads layer {layer} of the vision encoder, which has {count} layers "
                "whose attention can be read"
            )
    return sorted(set(chosen))


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
        setattr(outputs, _STATES, images)
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
        raise ValueError("pass input_ids, not inputs_embeds: placeholders of images are found there")
    if encoded.get("image") is None:
        names = inspect.signature(state.core.get_image_features).parameters
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        encoded["image"] = state.core.get_image_features(**inputs, return_dict=True)
    given["pixel_values"] = None
    given["mm_encoder_outputs"] = encoded
    return _Prefill(state, original, given).run()


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
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask must be [B, tokens] behind a prompt that was shortened")
    wanted = prompt.length + before + queries
    if mask is not None and mask.shape[1] != wanted:
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


@dataclass
class _Prefill:
    """A forward pass of a prompt with images."""

    state: VisualState
    original: Callable
    given: dict[str, Any]

    def run(self) -> Any:
        ids = self.given["input_ids"]
        method = self.state.method
        features = self.given["mm_encoder_outputs"]["image"]
        flat = _flat(features.pooler_output)
        visual = ids == self.state.core.config.image_token_id
        places = visual.nonzero()
        if len(places) != len(flat):
            return self.original(**self.given)  # which says how many there are of each
        images = self._images(features, visual.sum(1).tolist())
        newline = torch.zeros_like(visual)
        keys = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        deepstack = getattr(features, "deepstack_features", None)
        deep = None if deepstack is None else [torch.cat(list(level)) for level in deepstack]
        counts, first, changed = [], 0, False
        reductions: dict[int, Any] = {}
        text = partial(_text_of, self.state.core, ids, self._valid(), visual)
        for image in images:
            part = slice(first, first + image.count)
            first = part.stop
            rows, columns = places[part].unbind(1)
            newline[rows[image.newlines], columns[image.newlines]] = True
            if not hasattr(method, "reduce_visual"):
                counts.append((image.count, image.count))
                continue
            if id(image) not in reductions:
                tokens = flat[part][image.patches]
                embeddings = text(int(rows[0]) if len(rows) else 0)
                reductions[id(image)] = _reduce(method, image, tokens, *embeddings)
            slots, merged = reductions[id(image)]
            if merged is not None:
                flat, deep = _write(flat, deep, part.start + image.patches, merged)
                changed = True
            counts.append((image.count, len(slots)))
            if len(slots) == image.count and bool((slots[1:] > slots[:-1]).all()):
                continue
            # Sorted, the columns of those that stay are where they go.
            keys[rows, columns] = ids.shape[1]
            keys[rows[slots], columns[slots]] = columns[slots].sort().values
            changed = True
        self.state._latest.own.counts = tuple(counts)
        if not changed:
            return self._whole(visual, newline)
        return self._shortened(keys, visual, newline, places, flat, deep)

    def _valid(self) -> Tensor:
        """bool [B, L]: tokens that are no padding."""
        ids, mask = self.given["input_ids"], self.given.get("attention_mask")
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {list(ids.shape)}, as input_ids, where visual tokens are "
                "dropped"
            )
        return mask.bool()

    def _images(self, features: Any, visual: list[int]) -> list[Image]:
        """The images in the order of the placeholders; beams have those of a row again.

        Args:
            visual: the number of placeholders in each row.
        """
        images = getattr(features, _STATES, None)
        if images is None:
            why = "the images were encoded outside of the patch"
            rows = [x for x in features.pooler_output if len(x)]
            none = torch.empty(0, dtype=torch.long, device=self.given["input_ids"].device)
            every = [torch.arange(len(x), device=none.device) for x in rows]
            return [Image(len(x), x, none, why_not=why) for x in every]
        once = sum(image.count for image in images)
        beams = sum(visual) // max(once, 1)
        if beams == 1:
            return images
        found, left = [], iter(images)
        for row in range(0, len(visual), beams):
            group: list[Image] = []
            while sum(image.count for image in group) < visual[row]:
                group.append(next(left))
            found += group * beams
        return found

    def _whole(self, visual: Tensor, newline: Tensor) -> Any:
        """The whole prompt, which layers may still prune."""
        pruning = self.state.layers
        if pruning is None:
            return self.original(**self.given)
        ids, valid = self.given["input_ids"], self._valid()
        source = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
        kept = Kept(source, valid, bool(valid.all()))
        prompt = Prompt(ids.shape[1], kept, None)
        return self._through_layers(prompt, visual & valid, newline)

    def _shortened(
        self,
        keys: Tensor,
        visual: Tensor,
        newline: Tensor,
        places: Tensor,
        flat: Tensor,
        deep: list[Tensor] | None,
    ) -> Any:
        """The prompt without the tokens whose key is its length."""
        ids, valid = self.given["input_ids"], self._valid()
        length = ids.shape[1]
        kept = keep_in_order(keys.masked_fill(~valid, length), bool(valid[:, -1].all()))
        # The number of every placeholder, in the new order of the prompt.
        number = torch.zeros_like(ids)
        number[places[:, 0], places[:, 1]] = torch.arange(len(places), device=ids.device)
        left = kept.gather(visual, False)
        order = kept.gather(number)[left]
        core = self.state.core
        blank = int(core.config.image_token_id == 0)
        positions = _positions(core, self.given, kept, self.state.method.positions)
        mask = self.given.get("attention_mask")
        self.given.update(
            input_ids=kept.gather(ids, blank),
            attention_mask=kept.valid.to(torch.long if mask is None else mask.dtype),
            position_ids=positions,
        )
        for name in ("token_type_ids", "mm_token_type_ids"):
            if self.given.get(name) is not None:
                self.given[name] = kept.gather(self.given[name])
        encoded = self.given["mm_encoder_outputs"]
        encoded["image"] = _with_tokens(encoded["image"], flat[order], deep, order)
        prompt = Prompt(length, kept, kept.last(positions))
        return self._through_layers(prompt, left, kept.gather(newline, False))

    def _through_layers(self, prompt: Prompt, visual: Tensor, newline: Tensor) -> Any:
        pruning = self.state.layers
        if pruning is None:
            output = self.original(**self.given)
        else:
            with pruning.prompt(prompt, visual, newline):
                output = self.original(**self.given)
        cache = self.given.get("cache")
        cache = _cache_in(output) if cache is None else cache
        if cache is not None:
            prompt.cached = prompt.places
            remember(cache, prompt)
        return output


def _cache_in(output: Any) -> Cache | None:
    values = output if isinstance(output, tuple) else output.to_tuple()
    return next((value for value in values if isinstance(value, Cache)), None)


def _flat(features: Any) -> Tensor:
    """All visual tokens, [tokens, C], in the order of the placeholders."""
    return features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))


def _text_of(
    core: nn.Module, ids: Tensor, valid: Tensor, visual: Tensor, row: int
) -> tuple[Tensor, Tensor]:
    """(embeddings [1, T, C], mask bool [1, T]) of the text in a row."""
    text = ids[row][valid[row] & ~visual[row]][None]
    with torch.no_grad():
        return core.get_input_embeddings()(text), torch.ones_like(text, dtype=torch.bool)


def _reduce(
    method: Any, image: Image, tokens: Tensor, text: Tensor, text_mask: Tensor
) -> tuple[Tensor, VisualTokens | None]:
    """What stays of an image: its slots in their new order, newlines included, and new tokens."""
    call = VisualCall(
        tokens[None], image.layout, image.encoder, text, text_mask, image.pixels, image.why_not
    )
    result = method.reduce_visual(call) if tokens.shape[0] else None
    if result is None:
        chosen = torch.arange(len(tokens), device=tokens.device)
    else:
        indices = result.indices if isinstance(result, VisualTokens) else result
        chosen = indices[0][indices[0] >= 0].long()
    if chosen.unique().numel() != chosen.numel():
        raise ValueError(f"{type(method).__name__} keeps a token twice: {chosen.tolist()}")
    slots = image.patches[chosen]
    if method.newlines == "keep" and len(image.newlines):
        # Each follows the tokens that came before it in the image.
        earliest = slots.flip(0).cummin(0).values.flip(0) if len(slots) else slots
        both = torch.cat([slots, image.newlines])
        slots = both[torch.cat([earliest, image.newlines]).argsort(stable=True)]
    return slots, result if isinstance(result, VisualTokens) else None


def _write(
    flat: Tensor, deep: list[Tensor] | None, places: Tensor, merged: VisualTokens
) -> tuple[Tensor, list[Tensor] | None]:
    """flat and deep with new tokens at the places whose indices they take."""
    there = merged.indices[0] >= 0
    target = places[merged.indices[0][there].long()]
    flat = flat.index_copy(0, target, merged.tokens[0][there].to(flat.dtype))
    if deep is not None and merged.token_map is not None:
        slots = merged.token_map[0].long()
        inside = torch.where(slots >= 0, slots, len(there))
        for level, x in enumerate(deep):
            rows = x[places].float()
            sums = rows.new_zeros(len(there) + 1, rows.shape[1]).index_add(0, inside, rows)
            size = rows.new_zeros(len(there) + 1).index_add(0, inside, torch.ones_like(rows[:, 0]))
            means = (sums / size.clamp(min=1)[:, None])[:-1][there]
            deep[level] = x.index_copy(0, target, means.to(x.dtype))
    return flat, deep


def _with_tokens(outputs: Any, tokens: Tensor, deep: list[Tensor] | None, order: Tensor) -> Any:
    """A copy of the encoder's outputs with these visual tokens."""
    shortened = copy.copy(outputs)
    one_tensor = isinstance(outputs.pooler_output, Tensor)
    shortened.pooler_output = tokens[None] if one_tensor else [tokens]
    if deep is not None:
        shortened.deepstack_features = [[level[order]] for level in deep]
    return shortened


def _positions(core: nn.Module, given: dict[str, Any], kept: Kept, wanted: str) -> Tensor:
    """The positions of the tokens that stay: [B, M], or [planes, B, M] of several dimensions."""
    positions = given.get("position_ids")
    if positions is None:
        positions = _own_positions(core, given)
    if wanted == "renumbered" or (wanted == "auto" and positions.dim() == 2):
        ranks = kept.ranks()
        return ranks if positions.dim() == 2 else ranks.expand(len(positions), -1, -1)
    there = kept.gather(positions)
    if there.dim() == 3 and there.shape[0] == 4:
        # The first plane tells the places of text, for masks alone.
        there = torch.cat([kept.ranks()[None], there[1:]])
    return there


def _own_positions(core: nn.Module, given: dict[str, Any]) -> Tensor:
    """The positions that the model gives the whole prompt itself."""
    ids = given["input_ids"]
    compute = getattr(core, "get_rope_index", None)
    if compute is not None and given.get("mm_token_type_ids") is not None:
        names = inspect.signature(compute).parameters
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        return compute(**inputs)[0]
    return torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
