"""Puts a token-reduction method into an existing model, and takes it out again.

    with tokred.patch(model, "tome", r=8, trace_source=True) as handle:
        features = model(images)
        every_patch = handle.unmerge(features_before_pooling)

    with tokred.patch(language_model, "token_select", k=1024):
        language_model.generate(tokens)

    handle = tokred.apply(language_model, "token_select", k=1024)   # where a `with` does not fit
    handle.remove()

Only attributes of instances are replaced (the `forward` of modules, and a language model's choice
of attention), never classes, and leaving the block puts every one of them back, also after an
exception.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import warnings
from typing import Any

import torch
from torch import nn

from tokred import methods

from .overrides import Overrides
from .settings import Settings
from .token_state import TokenState

# Attributes in which diffusers' pipelines keep the model that they run at every step.
_DENOISERS = ("unet", "transformer", "unet_2", "transformer_2")


def patch(
    model: Any,
    method: str,
    *,
    prop_attn: bool = True,
    trace_source: bool = False,
    weighted_pool: bool = False,
    num_prefix: int | None = None,
    restore_tokens: bool | None = None,
    **options: Any,
) -> Patch:
    """A context manager inside which `model` runs with fewer tokens, or attends to fewer keys.

    Methods that merge work on timm VisionTransformers (and any module tree with timm Blocks) and on
    the encoders of images, sound and text of transformers, whose layers are recognised by what they
    compute; "tomesd" on diffusers' transformer blocks. In training and in eval mode, with any
    batch, under torch.compile(fullgraph=True).

    Padding never takes part: every row of a padded batch is reduced as it would be alone, which
    reads its length on the host and so does not compile.

    Methods that choose keys, such as "token_select", work on transformers' language models with
    full causal attention, with left padding and with any cache. They keep all tokens, and the
    arguments from prop_attn to restore_tokens are not for them.

    Methods for vision-language models drop or merge visual tokens before the language model or
    between its layers, through generate: see docs/vision_language.md. They have none of these
    arguments either.

    Patches nest: the innermost one counts, in whatever order they are left.

    Args:
        model: the model, or any module that contains its layers; or a pipeline of transformers or
            diffusers, whose `model`, `unet` or `transformer` is taken.
        method: a name from tokred.methods.METHODS.
        prop_attn: attend in proportion to the tokens' sizes (key bias log(size)). Supervised
            models need it; models pre-trained as masked autoencoders do better without.
        trace_source: keep the map from original to final tokens, for handle.unmerge.
        weighted_pool: timm's average pooling weighs tokens by their size, as a model trained with
            the mean of all patches expects. By default the merged tokens count alike, as published
            for supervised models.
        num_prefix: how many of the first tokens never merge; read off the model by default.
        restore_tokens: whether what is outside of the layers sees all tokens: every layer takes and
            returns as many as there were, those that have merged alike, those that were dropped
            (and padding) 0. Needed by what reads tokens as a grid or one by one: feature maps,
            intermediate features, DPT, segmentation, projectors of vision-language models. By
            default True for text, so that heads and means over the attention mask stay right, and
            False for all else.
        options: the method's own, such as r for "tome" and ratio for "pitome".

    Returns:
        A Patch: `with` enters it, any number of times; the value of the `with` is itself.

    Raises:
        ValueError: an unknown method, or one of functions alone; a model without layers the method
            can work on; a tensor-parallel model, and a method that needs all heads in one process.
        TypeError: an option the method does not have; a model that is no module.

    A Patch that is dropped without having been entered warns, as it did nothing.

    Forward passes may run in several threads at once, inside one another, and under
    torch.utils.checkpoint around whole layers or the whole model; backward() then belongs inside
    the patch, as it runs them again.

    Not supported, with an error that says so: attention dropout in training, attention weights and
    masks of more than padding (or a window) in layers that see merged tokens; without
    restore_tokens models that need every token; copying or pickling a patched model.
    """
    entry = methods.get(method)
    if entry.options is None:
        raise ValueError(
            f"{method!r} cannot be put into a model: call the functions of tokred.methods.{method}"
            f", which need {entry.needs_in_words}"
        )
    names = [field.name for field in dataclasses.fields(entry.options)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(
            f"{method!r} has no option {', '.join(unknown)}; its options are {', '.join(names)}, "
            "and every method has prop_attn, trace_source, weighted_pool, num_prefix, "
            "restore_tokens"
        )
    module = _module_of(model)
    if not getattr(entry.options, "heads_may_be_split", False) and _is_tensor_parallel(module):
        fit = [
            name
            for name, other in methods.METHODS.items()
            if getattr(other.options, "heads_may_be_split", False)
        ]
        raise ValueError(
            f"{method!r} cannot be put into a tensor-parallel model, whose processes would choose "
            f"by their own heads alone: use {' or '.join(fit)}"
        )
    settings = Settings(prop_attn, trace_source, weighted_pool, num_prefix, restore_tokens)
    return Patch(module, entry.options(**options), settings)


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether weights stay split over processes while layers run, unlike those of fully_shard."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    gathered = fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())
    return any(
        sum(not placement.is_replicate() for placement in weight.placements) > gathered
        for weight in model.parameters()
        if isinstance(weight, tensor.DTensor)
    )


def apply(model: Any, method: str, **options: Any) -> Patch:
    """Patches a model until `remove()` is called on what it returns; see `patch` for the arguments.

    The model stays patched where the handle is dropped.
    """
    handle = patch(model, method, **options)
    return handle.__enter__()


def _module_of(model: Any) -> nn.Module:
    """The module to patch: the model itself, or that of a pipeline."""
    if isinstance(model, nn.Module):
        return model
    kind = type(model).__name__
    parts = {name: getattr(model, name, None) for name in ("model", *_DENOISERS)}
    found = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise TypeError(
            "model must be a torch.nn.Module, or a pipeline with one as its model, unet or "
            f"transformer, got {kind}"
        )
    raise ValueError(
        f"{kind} has several models, {', '.join(found)}: pass one of them, as in "
        f"tokred.patch(pipeline.{next(iter(found))}, ...)"
    )


class Patch:
    """What tokred.patch returns: a context manager, and a view of the latest forward pass.

    The properties describe the one stack of layers that was patched, in the forward pass that the
    calling thread has completed last (or any thread, if it has run none). Where the model has
    several, `states` lists them in the order of the modules, and each has the same attributes.
    """

    _unused = False  # until a Patch is complete

    def __init__(self, model: nn.Module, method: Any, settings: Settings) -> None:
        self.model = model
        self.method = method
        self.settings = settings
        self._depth = 0
        self._lock = threading.RLock()
        self._overrides = Overrides()
        self.states: list[Any] = []
        self._stacks()  # refuses a model that it does not fit
        self._unused = True

    def __enter__(self) -> Patch:
        with self._lock:
            self._unused = False
            if self._depth == 0:
                try:
                    self.states = [
                        stack.install(self.method, self.settings, self._overrides)
                        for stack in self._stacks()
                    ]
                except BaseException as failure:
                    self._overrides.undo(failure)
                    raise
            self._depth += 1
        return self

    def __exit__(self, kind: Any, failure: BaseException | None, traceback: Any) -> None:
        with self._lock:
            self._depth = max(self._depth - 1, 0)
            if self._depth == 0:
                self._overrides.undo(failure)

    def remove(self) -> None:
        """Leaves the patch, however often it was entered; a second call does nothing."""
        with self._lock:
            self._depth = 0
            self._overrides.undo()

    def __del__(self) -> None:
        if self._unused and not sys.is_finalizing():
            warnings.warn(
                "tokred.patch(...) did nothing, as it was never entered: write `with "
                "tokred.patch(...):`, or call tokred.apply(...) and remove() on what it returns",
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def num_prefix(self) -> int:
        """How many of the first tokens never merge."""
        return self._state().num_prefix

    @property
    def counts(self) -> tuple[Any, ...]:
        """Tokens before the first layer, then after each merge.

        Of a vision-language model, (tokens, tokens kept) of each image in the latest prompt of the
        calling thread, before any layer of its language model.
        """
        state = self._state()
        return state.counts if hasattr(state, "counts") else self._token_state().counts

    @property
    def size(self) -> torch.Tensor:
        """f32 [B, N]: how many original tokens each final token stands for, 0 behind a row that has
        fewer than others."""
        return self._token_state().size

    @property
    def token_map(self) -> torch.Tensor:
        """i32 [B, N0]: the final token that each original token went to. Needs trace_source."""
        return self._token_state().token_map

    def unmerge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] of final tokens -> [B, N0, C]: every original token gets its group's."""
        return self._token_state().unmerge(tokens)

    @property
    def merged(self) -> dict[str, tuple[int, int]]:
        """For "tomesd", by the name of a block: its tokens, and how many its parts ran on."""
        state = self._state()
        if not hasattr(state, "merged"):
            raise RuntimeError("only tomesd merges inside blocks: counts shows what others merged")
        return state.merged

    def _stacks(self) -> list[Any]:
        # Integrations import patching, which knows none of them until a model is patched.
        from tokred import integrations

        return integrations.find(self.model, self.method, self.settings)

    def _state(self) -> Any:
        if len(self.states) != 1:
            raise RuntimeError(
                "the patch has not been entered yet"
                if not self.states
                else f"{len(self.states)} stacks of layers are patched: use handle.states[i], or "
                "patch the part of the model that holds one of them"
            )
        return self.states[0]

    def _token_state(self) -> TokenState:
        state = self._state()
        if not isinstance(state, TokenState):
            raise RuntimeError(
                "size, token_map and unmerge are of methods that merge or drop tokens inside an "
                "encoder, and this one works in a language model"
            )
        return state
