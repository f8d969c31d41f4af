"""Prunes visual tokens between the layers of a language model, in the prompt and its caches.

The layers from the first pruning on see a shorter prompt, so their caches are shorter than those of
the layers before; masks, and positions where they are numbered anew, are narrowed for each of them,
in the prompt and for every token behind it. A layer is a module that is called with hidden states
and, by keyword, attention_mask, position_embeddings and position_ids.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokred.patching import LayerStates, Overrides, PromptCall, PromptTokens
from tokred.patching.protocols import name_of
from tokred.selection import scatter_back

from .attention_tap import Recording, Stopped, missed, record, tap
from .full_attention import dispatches
from .prompt_rows import Kept, Prompt, Stage, extend_mask, keep_in_order, narrow_mask

_BLOCKS = {"self_attn": "attention", "mlp": "mlp"}


class _Running(threading.local):
    now: _InPrompt | _Behind | None = None


@dataclass
class LayerPruning:
    """A method between the layers of one language model.

    Raises:
        ValueError: a language model that it cannot be put into, or options that do not fit its
            number of layers.
    """

    method: Any
    language: nn.Module
    running: _Running = field(default_factory=_Running)

    def __post_init__(self) -> None:
        name = type(self.language).__name__
        layers = getattr(self.language, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(f"{name} has no list of layers to prune between")
        self.layers = list(layers)
        self.attention = [self._attention(layer) for layer in self.layers]
        config = self.attention[0].config
        kinds = getattr(config, "layer_types", None) or []
        if any("sliding" in kind or "chunked" in kind for kind in kinds) or (
            not kinds and getattr(config, "sliding_window", None) is not None
        ):
            raise ValueError(
                f"{name} has layers that see only a window of the tokens, whose caches cannot be "
                "shortened between layers: use a method that prunes before the language model, "
                "such as visionzip"
            )
        self.prunes = self._numbers("prune_layers")
        self.watches = self._numbers("watch") if hasattr(self.method, "watch") else []
        self.reads_neurons = getattr(self.method, "reads_neurons", False)

    def _attention(self, layer: nn.Module) -> nn.Module:
        found = [m for m in layer.modules() if dispatches(m)]
        if len(found) != 1:
            raise ValueError(
                f"{type(layer).__name__} does not have one attention module that calls "
                "transformers' attention interface"
            )
        return found[0]

    def _numbers(self, name: str) -> list[int]:
        count = len(self.layers)
        numbers = sorted(set(getattr(self.method, name)(count)))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < count:
            raise ValueError(
                f"{name_of(self.method)} prunes at layers {numbers}, and the language model "
                f"has layers 0 to {count - 1}"
            )
        return numbers

    def install(self, overrides: Overrides) -> None:
        """Puts the method between the layers."""
        tap(self.attention, overrides)
        for index, layer in enumerate(self.layers):
            overrides.replace(layer, "forward", _layer_forward, self, index)
        for index in self.watches:
            for name, block in _BLOCKS.items():
                module = getattr(self.layers[index], name, None)
                if module is None:
                    raise ValueError(f"{type(self.layers[index]).__name__} has no {name} to watch")
                overrides.pre_hook(module, partial(_keep_input, self, index, block))
                overrides.hook(module, partial(_keep_output, self, index, block))
            if self.reads_neurons:
                last = getattr(getattr(self.layers[index], "mlp", None), "down_proj", None)
                if last is None:
                    name = type(self.layers[index]).__name__
                    raise ValueError(f"{name} has no mlp.down_proj whose input are its neurons")
                overrides.pre_hook(last, partial(_keep_input, self, index, "neurons"))
        if hasattr(self.language, "_deepstack_process"):
            overrides.replace(self.language, "_deepstack_process", _deepstack, self)

    @contextmanager
    def prompt(self, prompt: Prompt, visual: Tensor, newline: Tensor) -> Iterator[None]:
        """Around the forward pass of a prompt.

        Args:
            visual: bool [B, M], placeholders, of which newline: bool [B, M] are no picture.
        """
        # The recorded modules are those right before a pruning.
        before = [self.attention[layer - 1] for layer in self.prunes if layer > 0]
        with record(before) as recording:
            yield from self._run(_InPrompt(self, prompt, visual & ~newline, newline, recording))

    @contextmanager
    def after(self, prompt: Prompt, before: int, queries: int) -> Iterator[None]:
        """Around a forward pass of `queries` tokens, of which `before` ran since the prompt."""
        yield from self._run(_Behind(self, prompt, before, queries))

    def _run(self, now: _InPrompt | _Behind) -> Iterator[None]:
        outer, self.running.now = self.running.now, now
        try:
            yield
        finally:
            self.running.now = outer


def _layer_forward(
    pruning: LayerPruning,
    index: int,
    original: Callable,
    hidden_states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    now = pruning.running.now
    if now is None:
        return original(hidden_states, *args, **kwargs)
    if args:
        raise ValueError("layers must be called with keywords, as transformers' models do")
    layer = pruning.layers[index]
    if torch.is_grad_enabled() and layer.training and getattr(
        layer, "gradient_checkpointing", False
    ):  # fmt: skip
        raise ValueError(
            "layers that are recomputed in the backward pass cannot prune: switch gradient "
            "checkpointing off, or use a method that prunes before the language model"
        )
    return now.layer(index, original, hidden_states, kwargs)


def _keep_input(
    pruning: LayerPruning, index: int, block: str, module: nn.Module, args: tuple, kwargs: dict
) -> None:
    now = pruning.running.now
    if isinstance(now, _InPrompt) and not now.probing:
        given = args[0] if args else kwargs["hidden_states"]
        now.watched[index, f"{block}_in"] = given.detach()


def _keep_output(
    pruning: LayerPruning, index: int, block: str, module: nn.Module, args: Any, output: Any
) -> None:
    now = pruning.running.now
    if isinstance(now, _InPrompt) and not now.probing:
        output = output[0] if isinstance(output, tuple) else output
        now.watched[index, f"{block}_out"] = output.detach()


def _deepstack(
    pruning: LayerPruning, original: Callable, hidden_states: Tensor, masks: Tensor, embeds: Tensor
) -> Tensor:
    """Features added to the visual tokens after a layer: to those that are left."""
    now = pruning.running.now
    if not isinstance(now, _InPrompt) or now.kept is None:
        return original(hidden_states, masks, embeds)
    number = torch.zeros_like(masks, dtype=torch.long)
    number[masks] = torch.arange(len(embeds), device=masks.device)
    left = now.kept.gather(masks, False)
    return original(hidden_states, left, embeds[now.kept.gather(number)[left]])


@dataclass
class _InPrompt:
    """A forward pass of a prompt: kept are the places, among those of the first layer, that the
    layers see now; None for all."""

    pruning: LayerPruning
    prompt: Prompt
    visual: Tensor
    newline: Tensor
    recording: Recording
    kept: Kept | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    watched: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    probing: bool = False
    narrowed: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = self.visual.sum(1).int()
        self.valid = self.prompt.kept.valid

    def layer(self, index: int, original: Callable, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        pruning = self.pruning
        if index in pruning.prunes and self.visual.any():
            x = self._prune(index, original, x, kwargs)
        output = original(x, **self._inputs(kwargs))
        if index in pruning.watches and self.visual.any():
            kinds = ("attention_in", "attention_out", "mlp_in", "mlp_out")
            states = [self.watched.pop((index, kind)) for kind in kinds]
            neurons = self.watched.pop((index, "neurons_in"), None)
            pruning.method.observe(
                LayerStates(
                    index,
                    len(pruning.layers),
                    *states,
                    self.valid,
                    self.visual,
                    self.carried,
                    neurons,
                )
            )
        return output

    def _inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's arguments, for the tokens that are left."""
        kept = self.kept
        if kept is None:
            return kwargs
        kwargs = dict(kwargs)
        if "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
            kwargs["attention_mask"] = self._once(mask, lambda: narrow_mask(mask, kept))
        positions = kwargs.get("position_ids")
        stage = self.prompt.stages[-1]
        new = stage.last is not None
        if positions is not None:
            kwargs["position_ids"] = kept.ranks() if new else kept.gather(positions)
        tables = kwargs.get("position_embeddings")
        if tables is not None:
            kwargs["position_embeddings"] = self._once(
                tables[0],
                lambda: (
                    self._renumbered(tables[0])
                    if new
                    else tuple(kept.gather(table, dim=1) for table in tables)
                ),
            )
        return kwargs

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """make(), called once for an input that several layers share."""
        if id(key) not in self.narrowed:
            self.narrowed[id(key)] = key, make()
        return self.narrowed[id(key)][1]

    def _renumbered(self, like: Tensor) -> tuple[Tensor, Tensor]:
        assert self.kept is not None
        return _rotary(self.pruning.language, self.kept.ranks(), like)

    def _prune(self, index: int, original: Callable, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """x without the tokens that the method gives up before this layer."""
        pruning, method = self.pruning, self.pruning.method
        slots, is_slot = _slots(self.visual)
        inputs = {**self._inputs(kwargs), "use_cache": False}
        inputs.pop("past_key_values", None)
        inputs["cache"] = None
        call = PromptCall(
            x, index, len(pruning.layers), self.valid, self.visual,
            torch.where(is_slot, slots, -1).int(), self.original, self.carried,
            None if index == 0 else partial(self._previous, index),
            partial(self._following, index, original, x, inputs),
            getattr(pruning.attention[index], "scaling", None),
        )  # fmt: skip
        chosen = method.prune(call)
        if isinstance(chosen, PromptTokens):
            x = _with_tokens(x, slots, is_slot, chosen)
            chosen = torch.cat([chosen.slots, chosen.made], 1)
        drops_newlines = method.newlines == "drop" and bool(self.newline.any())
        if chosen is None and not drops_newlines:
            return x
        length = x.shape[1]
        stays = self.valid & ~self.visual
        if drops_newlines:
            stays &= ~self.newline
        if chosen is None:
            stays |= self.visual
        else:
            spare = torch.zeros_like(is_slot[:, :1]).expand(-1, slots.shape[1] + 1).clone()
            rows = torch.where(chosen >= 0, chosen, slots.shape[1]).long()
            spare.scatter_(1, rows, True)
            wanted = spare[:, :-1] & is_slot
            places = torch.where(wanted, slots, length)
            spare = torch.zeros_like(stays[:, :1]).expand(-1, length + 1).clone()
            stays |= spare.scatter_(1, places, True)[:, :-1]
        if bool((stays == self.valid).all()):
            return x
        keys = torch.where(stays, torch.arange(length, device=x.device), length)
        step = keep_in_order(keys, bool(self.valid[:, -1].all()))
        before = self.kept
        source = step.source if before is None else before.source.gather(1, step.source)
        self.kept = Kept(source, step.valid, step.whole)
        self.visual = step.gather(self.visual, False)
        self.newline = step.gather(self.newline, False)
        self.valid = step.valid
        for name, value in self.carried.items():
            self.carried[name] = step.gather(value, dim=1)
        new = method.positions == "renumbered" or (
            method.positions == "auto" and not _has_planes(pruning.language)
        )
        last = step.valid.sum(1) - 1 if new else None
        self.prompt.stages.append(Stage(index, self.kept, last))
        self.narrowed.clear()
        return step.gather(x, dim=1)

    def _previous(self, index: int) -> tuple[Tensor, Tensor]:
        """The queries and keys of the layer before, of the tokens that it saw."""
        return _heads(self.recording, self.pruning.attention[index - 1])

    def _following(
        self, index: int, original: Callable, x: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The queries and keys of the layer itself, which is run up to its attention."""
        attention = self.pruning.attention[index]
        self.probing = True
        try:
            with torch.no_grad(), record([attention], stops=True) as recording:
                original(x, **inputs)
        except Stopped:
            pass
        finally:
            self.probing = False
        return _heads(recording, attention)


@dataclass
class _Behind:
    """A forward pass of tokens behind a prompt."""

    pruning: LayerPruning
    prompt: Prompt
    before: int
    queries: int
    narrowed: dict[tuple[int, int], Any] = field(default_factory=dict)

    def layer(self, index: int, original: Callable, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        stages = [number for number, s in enumerate(self.prompt.stages) if s.layer <= index]
        if not stages:
            return original(x, **kwargs)
        number, prompt = stages[-1], self.prompt
        stage, tail = prompt.stages[number], self.before + self.queries
        kwargs = dict(kwargs)
        if "attention_mask" in kwargs:
            mask = kwargs["attention_mask"]
            key = number, id(mask)
            if key not in self.narrowed:
                self.narrowed[key] = (
                    mask,
                    extend_mask(mask, stage.kept, prompt.places, tail, self.queries),
                )
            kwargs["attention_mask"] = self.narrowed[key][1]
        if stage.last is not None:
            step = torch.arange(1 + self.before, 1 + tail, device=x.device)
            positions = stage.last[:, None] + step
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = positions
            tables = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = _rotary(self.pruning.language, positions, tables[0])
        return original(x, **kwargs)


def _heads(recording: Recording, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """The queries and keys of a module's one call."""
    calls = recording.calls[attention]
    if len(calls) != 1:
        raise RuntimeError(missed(attention))
    return calls[0].q, calls[0].k


def _slots(visual: Tensor) -> tuple[Tensor, Tensor]:
    """(i64 [B, V], bool [B, V]): the places of each row's visual tokens, and which there are."""
    length = visual.shape[1]
    place = torch.arange(length, device=visual.device)
    places = torch.where(visual, place, length).sort(1).values
    places = places[:, : int(visual.sum(1).amax())]
    return places.clamp(max=length - 1), places < length


def _with_tokens(x: Tensor, slots: Tensor, is_slot: Tensor, new: PromptTokens) -> Tensor:
    """x [B, L, C] with the new tokens at the places of their slots."""
    rows = new.made.clamp(min=0).long()
    there = (new.made >= 0) & is_slot.gather(1, rows)
    return scatter_back(x, new.tokens, torch.where(there, slots.gather(1, rows), -1))


def _has_planes(language: nn.Module) -> bool:
    """Whether positions have several dimensions (M-RoPE)."""
    return hasattr(getattr(language, "rotary_emb", None), "mrope_section")


def _rotary(language: nn.Module, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin at positions [B, L], as the language model makes them."""
    if _has_planes(language):
        positions = positions.expand(3, -1, -1)
    return language.rotary_emb(like, positions)
