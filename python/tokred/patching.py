"""Puts a token-reduction method into an existing model, and takes it out again.

    with tokred.patch(model, "tome", r=8, trace_source=True) as handle:
        features = model(images)
        every_patch = handle.unmerge(features_before_pooling)

    with tokred.patch(language_model, "token_select", k=1024):
        language_model.generate(tokens)

Only attributes of instances are replaced (the `forward` of modules, and a language model's choice
of attention), never classes, and leaving the block puts every one of them back, also after an
exception.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import tokred
from tokred import methods, models


def patch(
    model: nn.Module,
    method: str,
    *,
    prop_attn: bool = True,
    trace_source: bool = False,
    weighted_pool: bool = False,
    num_prefix: int | None = None,
    **options: Any,
) -> Patch:
    """A context manager inside which `model` runs with fewer tokens, or attends to fewer keys.

    Methods that merge work on timm VisionTransformers (and any module tree with timm Blocks) and on
    the ViT, DeiT, DINOv2, SigLIP and CLIP vision models of transformers; "tomesd" on diffusers'
    transformer blocks. In training and in eval mode, with any batch, under
    torch.compile(fullgraph=True).

    Methods that choose keys, such as "token_select", work on transformers' language models with
    full causal attention, with left padding and with any cache. They keep all tokens, and the four
    arguments from prop_attn to num_prefix are not for them.

    Patches nest: the innermost one counts, and they are undone in the reverse order.

    Args:
        model: the model, or any module that contains its layers.
        method: a name from tokred.methods.METHODS.
        prop_attn: attend in proportion to the tokens' sizes (key bias log(size)). Supervised
            models need it; models pre-trained as masked autoencoders do better without.
        trace_source: keep the map from original to final tokens, for handle.unmerge.
        weighted_pool: timm's average pooling weighs tokens by their size, as a model trained with
            the mean of all patches expects. By default the merged tokens count alike, as published
            for supervised models.
        num_prefix: how many of the first tokens never merge; read off the model by default.
        options: the method's own, such as r for "tome" and ratio for "pitome".

    Returns:
        A Patch: `with` enters it, any number of times; the value of the `with` is itself.

    Raises:
        ValueError: an unknown method, or one of functions alone; a model without layers the method
            can work on.
        TypeError: an option the method does not have.

    Not supported, with an error that says so: attention masks, attention dropout in training,
    gradient checkpointing and attention weights in layers that see merged tokens.
    """
    module = methods.get(method).load()
    options_class = getattr(module, "OPTIONS", None)
    if options_class is None:
        raise ValueError(
            f"{method!r} cannot be put into a model: use the functions of {module.__name__}"
        )
    names = [field.name for field in dataclasses.fields(options_class)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(
            f"{method!r} has no option {', '.join(unknown)}; its options are {', '.join(names)}, "
            "and every method has prop_attn, trace_source, weighted_pool, num_prefix"
        )
    settings = Settings(prop_attn, trace_source, weighted_pool, num_prefix)
    return Patch(model, options_class(**options), settings)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options every method has; patch() documents them."""

    prop_attn: bool = True
    trace_source: bool = False
    weighted_pool: bool = False
    num_prefix: int | None = None


class Overrides:
    """Attributes set on instances, and hooks, all of which undo() takes back."""

    def __init__(self) -> None:
        self._assigned: list[tuple[Any, str, Any, Any]] = []
        self._replaced: list[tuple[nn.Module, str, Any, Any]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def replace(self, module: nn.Module, name: str, function: Callable, *args: Any) -> None:
        """Makes module.name(...) call function(*args, original, ...)."""
        previous = getattr(module, name)
        original = getattr(previous, "tokred_original", previous)
        replacement = partial(function, *args, original)
        replacement.tokred_original = original
        self._replaced.append((module, name, module.__dict__.get(name), replacement))
        setattr(module, name, replacement)

    def assign(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of anything, such as a config."""
        self._assigned.append((owner, name, getattr(owner, name), value))
        setattr(owner, name, value)

    def hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Calls function(module, args, output) after each of module's forward passes."""
        self._hooks.append(module.register_forward_hook(function))

    def undo(self) -> None:
        """Restores everything.

        Raises:
            RuntimeError: something was replaced again since; nothing is restored then.
        """
        for module, name, _, replacement in self._replaced:
            if module.__dict__.get(name) is not replacement:
                raise RuntimeError(
                    f"{type(module).__name__}.{name} was replaced after this patch was applied: "
                    "leave nested patches in the reverse order of entering them"
                )
        for owner, name, _, value in self._assigned:
            if getattr(owner, name) != value:
                raise RuntimeError(
                    f"{type(owner).__name__}.{name} was changed inside the patch, from {value!r} "
                    f"to {getattr(owner, name)!r}: change it back before leaving"
                )
        for owner, name, previous, _ in reversed(self._assigned):
            setattr(owner, name, previous)
        for module, name, previous, _ in reversed(self._replaced):
            if previous is None:
                delattr(module, name)
            else:
                setattr(module, name, previous)
        for hook in self._hooks:
            hook.remove()
        self._assigned.clear()
        self._replaced.clear()
        self._hooks.clear()


class TokenState:
    """One stack of layers: what each of them merges, and the state of the latest forward pass.

    The first layer starts a forward pass afresh, so nothing carries over from one to the next,
    and torch.compile sees only attributes that are written before they are read. One forward pass
    at a time: threads need models of their own.
    """

    def __init__(self, plans: list, num_prefix: int, settings: Settings) -> None:
        self.plans = plans
        self.num_prefix = num_prefix
        self.prop_attn = settings.prop_attn
        self.trace_source = settings.trace_source
        self.ran = False
        self.counts: tuple[int, ...] = ()
        self.size: torch.Tensor | None = None
        self.token_map: torch.Tensor | None = None
        self.ones: torch.Tensor | None = None
        self.metric: torch.Tensor | None = None

    def begin(self, x: torch.Tensor) -> None:
        """Starts a forward pass on x [B, N, C]."""
        self.ran = True
        self.counts = (x.shape[1],)
        self.size = self.token_map = self.metric = None
        # The sizes before any merge: one element, so that an unmerged pass costs nothing.
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.ones = torch.ones(1, 1, dtype=wide, device=x.device).expand(x.shape[0], x.shape[1])

    def key_bias(self) -> torch.Tensor | None:
        """log(size) f32 [B, 1, N], or None where attention needs no bias."""
        if self.size is None or not self.prop_attn:
            return None
        return self.size.log().unsqueeze(1)

    def reduce(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Merges x [B, N, C] as the layer's plan says, by the metric its attention left here."""
        metric, self.metric = self.metric, None
        if metric.dtype == torch.float64:
            metric = metric.float()
        plan = self.plans[layer](metric, self.num_prefix)
        if plan is None:
            return x
        token_map, num_out = plan
        # SigLIP's tokens come channel-first out of the patch convolution; the op wants rows.
        x, self.size = tokred.merge(x.contiguous(), token_map, num_out, self.size)
        self.counts += (num_out,)
        if self.trace_source:
            earlier = self.token_map
            self.token_map = token_map if earlier is None else tokred.compose(token_map, earlier)
        return x


class Patch:
    """What tokred.patch returns: a context manager, and a view of the latest forward pass.

    The properties describe the one stack of layers that was patched; where the model has several,
    `states` lists them in the order of the modules, and each has the same attributes.
    """

    def __init__(self, model: nn.Module, method: Any, settings: Settings) -> None:
        self.model = model
        self.method = method
        self.settings = settings
        self._depth = 0
        self._overrides = Overrides()
        self.states: list[Any] = []
        models.attach(model, method, settings, self._overrides, check_only=True)

    def __enter__(self) -> Patch:
        if self._depth == 0:
            try:
                self.states = models.attach(self.model, self.method, self.settings, self._overrides)
            except BaseException:
                self._overrides.undo()
                raise
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._depth == 1:
            self._overrides.undo()
        self._depth -= 1

    @property
    def num_prefix(self) -> int:
        """How many of the first tokens never merge."""
        return self._state().num_prefix

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens before the first layer, then after each merge."""
        return self._latest().counts

    @property
    def size(self) -> torch.Tensor:
        """f32 [B, N]: how many original tokens each final token stands for."""
        state = self._latest()
        return state.ones if state.size is None else state.size

    @property
    def token_map(self) -> torch.Tensor:
        """i32 [B, N0]: the final token that each original token went to. Needs trace_source."""
        state = self._latest()
        if not state.trace_source:
            raise RuntimeError("the token map is only kept with tokred.patch(trace_source=True)")
        if state.token_map is None:
            batch, tokens = state.ones.shape
            identity = torch.arange(tokens, dtype=torch.int32, device=state.ones.device)
            return identity.repeat(batch, 1)
        return state.token_map

    def unmerge(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, N, C] of final tokens -> [B, N0, C]: every original token gets its group's."""
        return tokred.unmerge(tokens, self.token_map)

    def _state(self) -> Any:
        if len(self.states) != 1:
            raise RuntimeError(
                "the patch has not been entered yet"
                if not self.states
                else f"{len(self.states)} stacks of layers are patched: use handle.states[i], or "
                "patch the part of the model that holds one of them"
            )
        return self.states[0]

    def _latest(self) -> TokenState:
        state = self._state()
        if not isinstance(state, TokenState):
            raise RuntimeError("this method leaves all tokens in place: there is no token state")
        if not state.ran:
            raise RuntimeError("no forward pass has run inside the patch yet")
        return state
