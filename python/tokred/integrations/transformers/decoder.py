"""transformers' language models: methods that choose which cached keys a layer attends to.

The model runs on tokred's attention (attention.py) inside the patch, and every full-attention layer
calls the method, a KeySelector, instead. `attend` is called once a layer and forward pass, in their
order, and by several threads if the model is. Methods count full-attention layers only, from 0.
Layers that see only a part of the keys, by a window, in chunks or by lists of their own, are not
touched.

With rotation "compact" the queries and keys come without rotation, and are cached so: a cache made
inside the patch then fits only models inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tokred.patching import AttentionCall, KeySelector, Overrides, Settings
from tokred.patching.protocols import name_of
from tokred.patching.recomputation import refuse_late_backward
from tokred.patching.token_state import refuse_copy

from . import attention
from .full_attention import explain, full_attention, looks_both_ways
from .parallel_heads import other_heads
from .rotary import Rotary, find_rotary, unrotated

__all__ = ["Rotary", "Stack", "stacks"]


@dataclass(frozen=True)
class Bound:
    """The method in one model, with the model's rotary embedding where it compacts positions."""

    method: KeySelector
    rotary: Rotary | None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()

    def forward_pass(self) -> Pass:
        """This model's innermost pass in this thread; a new one for a layer called by itself."""
        running = _running.innermost
        while running is not None:
            if running.bound is self:
                return running
            running = running.outer
        return Pass(self, {}, None)


@dataclass
class Pass:
    """A forward pass of a decoder.

    carried: what layers leave for later ones, see AttentionCall. outer: the forward pass that this
    one runs inside of, if any. is_prompt: a layer of it has had several queries. grad: it
    began with gradients. checkpointed: a layer ran without, as in a reentrant checkpoint.
    """

    bound: Bound
    carried: dict[str, Any]
    outer: Pass | None
    is_prompt: bool = False
    grad: bool = False
    checkpointed: bool = False


class _Running(threading.local):
    innermost: Pass | None = None


_running = _Running()


@dataclass
class LayerMethod:
    """The method for one layer in one forward pass, which the attention function calls.

    called: whether it has, as it does unless the layer runs on another attention.
    """

    bound: Bound
    layer: int
    module: nn.Module
    called: bool = False

    def refuse_packed(self) -> None:
        """Refuses a PackedCache at its first tokens, where the method cannot read one later.

        Raises:
            ValueError: it needs keys as tensors, or without rotation.
        """
        name = name_of(self.bound.method)
        if self.bound.rotary is not None:
            raise ValueError(
                f"{name} with rotation='compact' rotates cached keys anew, which a PackedCache "
                "does not allow: use rotation='cached', or a DynamicCache"
            )
        if not getattr(self.bound.method, "reads_packed", False):
            raise ValueError(
                f"{name} cannot choose among the keys of a PackedCache: use a DynamicCache, or "
                "token_select or top_k_attention"
            )

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """See KeySelector; the call as the attention function has it."""
        self.called = True
        bound = self.bound
        running = bound.forward_pass()
        if running.grad and not torch.is_grad_enabled():
            running.checkpointed = True
        if call.q.shape[2] > 1:
            running.is_prompt = True
        # A full-attention layer that passes a window on does not apply it.
        call = replace(
            call, layer=self.layer, rotary=bound.rotary, window=None, carried=running.carried,
            in_prompt=running.is_prompt, other_heads=other_heads(self.module, call.q.shape[1]),
        )  # fmt: skip
        return bound.method.attend(call)


@dataclass(frozen=True)
class Stack:
    """The full-attention modules of one decoder, and what is needed to put a method there."""

    modules: list[nn.Module]
    decoder: nn.Module
    state: KeySelector
    rotary: Rotary | None

    def install(self, method: Any, settings: Settings, overrides: Overrides) -> Any:
        """Puts the method into the modules; returns its state."""
        bound = Bound(self.state, self.rotary)
        # The attribute, as the property would set the configs of other parts of the model too.
        config = self.modules[0].config
        overrides.assign(config, "_attn_implementation_internal", attention.register())
        overrides.replace(self.decoder, "forward", _decoder_forward, bound, self.decoder)
        for layer, module in enumerate(self.modules):
            overrides.replace(module, "forward", _attention_forward, bound, layer, module)
        return self.state


def stacks(model: nn.Module, method: Any, settings: Settings) -> Iterator[Stack]:
    """The decoders in the model: runs of attention modules that share a config.

    Raises:
        ValueError: options of token merging; options that do not fit the number of layers; a
            rotation that the model's modules do not have; modules that tokred's attention cannot
            serve.
    """
    for names in _decoders(full_attention(model)):
        modules = [model.get_submodule(name) for name in names]
        if settings != Settings():
            raise ValueError(
                "prop_attn, trace_source, weighted_pool and num_prefix are for methods that merge "
                "tokens; this one chooses keys"
            )
        state = method.attention(_numbers(modules))
        compact = getattr(method, "rotation", "cached") == "compact"
        if compact and looks_both_ways(modules[0].config):
            raise ValueError(
                f"{type(modules[0]).__name__} lets tokens of a prompt see later ones, and compact "
                "positions are those of the keys before a query: use rotation='cached'"
            )
        rotary = find_rotary(model, modules) if compact else None
        yield Stack(modules, _decoder(model, names), state, rotary)


def why_not(model: nn.Module) -> str:
    """Why there are no stacks in a model."""
    return explain(model)


def _decoders(found: dict[str, nn.Module]) -> list[list[str]]:
    """The names of attention modules, apart where the config changes or layers begin anew."""
    runs: list[list[str]] = []
    last: nn.Module | None = None
    for name, module in found.items():
        follows = last is not None and module.config is last.config
        if follows and (module.layer_idx < 0 or module.layer_idx > last.layer_idx):
            runs[-1].append(name)
        else:
            runs.append([name])
        last = module
    return runs


def _numbers(modules: Sequence[nn.Module]) -> list[int]:
    """The model's own numbers of the layers; places in the list where modules serve many layers."""
    return [m.layer_idx if m.layer_idx >= 0 else place for place, m in enumerate(modules)]


def _decoder(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The innermost module around all of them that has a forward of its own."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    path = [parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, levels)]
    while True:
        module = model.get_submodule(".".join(path))
        if type(module).forward is not nn.Module.forward:
            return module
        if not path:
            raise ValueError(
                f"{type(model).__name__} does not call its layers itself: pass the model that does"
            )
        path.pop()


def _decoder_forward(
    bound: Bound, decoder: nn.Module, original: Callable, *args: Any, **kwargs: Any
) -> Any:
    outer = _running.innermost
    running = _running.innermost = Pass(bound, {}, outer, grad=torch.is_grad_enabled())
    try:
        output = original(*args, **kwargs)
    finally:
        _running.innermost = outer
    if running.checkpointed:
        refuse_late_backward(output, decoder)
    return output


def _attention_forward(
    bound: Bound, layer: int, module: nn.Module, original: Callable, *args: Any, **kwargs: Any
) -> Any:
    if bound.rotary is not None:
        if kwargs.get("position_embeddings") is None:
            raise ValueError(
                f"{type(module).__name__} was called without position_embeddings as a keyword: use "
                "rotation='cached'"
            )
        kwargs["position_embeddings"] = unrotated(*kwargs["position_embeddings"])
    layer_method = LayerMethod(bound, layer, module)
    result = original(*args, tokred_method=layer_method, **kwargs)
    if not layer_method.called:
        raise RuntimeError(
            f"{type(module).__name__} did not hand its attention to tokred: its attention "
            "implementation was changed inside the patch, or it does not pass its arguments on"
        )
    return result
