"""transformers: encoders of images, sound and text, whatever their names, that merge tokens.

An encoder is a list of layers of a known shape (encoder_layers), with attention through
transformers' interface. There it attends as its own implementation does until tokens have merged,
and in proportion to their sizes from then on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

import tokred
from tokred import compat
from tokred.integrations.positions import following
from tokred.integrations.walk import ancestors, layer_lists
from tokred.patching import Overrides, Settings, TokenReducer, TokenState

from .encoder_layers import LayerShape, accepted, attention_in, first_of, parameters_of, shape_of

_PREFIX = "tokred_encoder_"

# Tokens that encoders put before those of the input; others among the embeddings are not tokens.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token")
_REGISTERS = "register_tokens"
_NO_TOKENS = ("mask_token", "token_type_embeddings", "token_type_ids", "pad_token")

# What may be around an encoder that gives fewer tokens: it pools them.
_POOLS = (
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
    "ForAudioClassification",
    "ModelWithProjection",
    "VisionEncoderDecoderModel",
)
_TEXT_POOLS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


@dataclass(frozen=True)
class Stack:
    """The layers of one encoder, and the attention pooling above it, if it has one."""

    layers: list[nn.Module]
    shape: LayerShape | None
    num_prefix: int
    restore: bool
    pooling_head: nn.Module | None

    def install(self, method: TokenReducer, settings: Settings, overrides: Overrides) -> TokenState:
        """Puts the method into the layers; returns their state."""
        settings = replace(settings, restore_tokens=self.restore)
        follow = any(_positions(layer) for layer in self.layers)
        state = TokenState(method, len(self.layers), self.num_prefix, settings, follow)
        for index, layer in enumerate(self.layers):
            function = partial(_layer_forward, state, self.shape, index, layer)
            overrides.replace(layer, "forward", function)
            found = attention_in(layer)
            if state.layers and found is not None:
                overrides.assign(found[1], "tokred_state", state)
                if not found[1].config._attn_implementation.startswith(_PREFIX):
                    name = _register(found[1].config._attn_implementation)
                    overrides.assign(found[1].config, "_attn_implementation_internal", name)
        if self.pooling_head is not None and state.layers and not state.restores:
            head = self.pooling_head
            overrides.replace(head, "forward", _pooling_head_forward, state, head)
        return state


# ---- Where encoders are, and what is refused ----------------------------------------------------


def stacks(model: nn.Module, method: TokenReducer, settings: Settings) -> Iterator[Stack]:
    """The encoders in the model.

    Raises:
        ValueError: one whose tokens cannot merge, a model that needs all of its tokens, or an
            unsupported option; the message says why.
    """
    for name, layers in layer_lists(model, lambda layer: attention_in(layer) is not None):
        around = list(ancestors(model, name))
        if not _is_encoder(layers, around, model):
            continue
        shape = None
        restore = settings.restore_tokens
        if restore is None:
            restore = _reads_text(layers[0], around)
        if method.layers(len(layers)):
            shape = shape_of(layers[-1])
            why = _cannot_merge(layers, around, shape)
            if why:
                raise ValueError(f"{type(layers[0]).__name__} {why}: its tokens cannot merge")
            if not restore:
                _refuse_readers(layers[0], around)
        if settings.weighted_pool:
            raise ValueError("weighted_pool is for timm models; these pool inside their forward")
        heads = [getattr(module, "head", None) for module in around]
        head = next((head for head in heads if _pools_by_attention(head)), None)
        yield Stack(layers, shape, _num_prefix(around, settings), restore, head)


def why_not(model: nn.Module) -> str:
    """Why `stacks` finds nothing in a model of transformers."""
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return ""
    return (
        "no list of layers has one attention each that looks both ways and calls transformers' "
        "attention interface"
    )


def _is_encoder(layers: list[nn.Module], around: list[nn.Module], model: nn.Module) -> bool:
    """Whether the layers are an encoder of their own: of two towers, text is not."""
    if not all(type(layer).__module__.startswith("transformers.models.") for layer in layers):
        return False
    found = attention_in(layers[0])
    assert found is not None
    config = found[1].config
    if "Text" in type(config).__name__ and getattr(model, "config", None) is not config:
        return False
    called = [name for module in around for name in _names_called(module)]
    return "create_causal_mask" not in called or "create_bidirectional_mask" in called


def _names_called(module: nn.Module) -> tuple[str, ...]:
    function = inspect.unwrap(type(module).forward)
    return function.__code__.co_names if inspect.isfunction(function) else ()


def _cannot_merge(
    layers: list[nn.Module], around: list[nn.Module], shape: LayerShape | None
) -> str:
    """Why the tokens of the layers cannot merge, in words; empty where they can."""
    found = attention_in(layers[0])
    assert found is not None
    attention = found[1]
    called = [name for module in around for name in _names_called(module)]
    if "cu_seqlens" in parameters_of(attention)[0] or "generate_block_attention_mask" in called:
        return "takes the patches of all images in one row, where those of several would merge"
    inside = [*(name for layer in layers for name, _ in layer.named_modules())]
    inside += [name for module in around for name, _ in module.named_children()]
    takes_bias = "position_bias" in parameters_of(attention)[0]
    words = ("position_bias", "relative_position", "relative_attention")
    if takes_bias or any(word in name for name in inside for word in words):
        return "adds a bias for every pair of positions to its attention (relative positions)"
    depth = getattr(attention.config, "num_hidden_layers", len(layers))
    if depth != len(layers):
        return f"runs {depth} times on {len(layers)} layers"
    if shape is None or len({type(layer) for layer in layers}) > 1:
        return "is not attention, then a part that takes every token by itself, in a known order"
    return ""


def _refuse_readers(layer: nn.Module, around: list[nn.Module]) -> None:
    """Raises where something around an encoder of transformers needs all of its tokens."""
    found, ends = attention_in(layer), _TEXT_POOLS if _reads_text(layer, around) else _POOLS
    assert found is not None
    for module in around:
        names = [
            kind.__name__
            for kind in type(module).__mro__
            if kind.__module__.startswith("transformers.models.")
        ]
        if not names:
            continue
        own = getattr(module, "config", None) is found[1].config  # it returns its tokens
        plain = own and names[0].endswith(("Encoder", "Model", "Transformer"))
        dual = hasattr(module, "get_image_features") and hasattr(module, "get_text_features")
        if not (plain or dual or (names[0].endswith(ends) and _pools_one(module))):
            raise ValueError(
                f"{names[0]} needs every token of its encoder, as a grid or one by one: pass "
                "restore_tokens=True, or patch a model that pools them, such as "
                "ViTForImageClassification, Dinov2Model or CLIPModel"
            )


def _pools_one(module: nn.Module) -> bool:
    """Whether a text classifier reads its first token, and no mean over the attention mask."""
    return getattr(getattr(module, "config", None), "classifier_pooling", "cls") == "cls"


def _pools_by_attention(head: Any) -> bool:
    """Whether it is the pooling of SigLIP: a learnt query that attends to all tokens."""
    parts = ("probe", "attention", "layernorm", "mlp")
    return isinstance(getattr(head, "attention", None), nn.MultiheadAttention) and all(
        hasattr(head, part) for part in parts
    )


def _embeddings(around: list[nn.Module]) -> nn.Module | None:
    """The module that embeds the tokens of an encoder."""
    for module in around:
        for name, child in module.named_children():
            if "embed" in name:
                return child
    return None


def _reads_text(layer: nn.Module, around: list[nn.Module]) -> bool:
    """Whether the tokens of an encoder are embeddings of a vocabulary."""
    made, found = _embeddings(around), attention_in(layer)
    size = getattr(found[1].config, "vocab_size", None) if found else None
    parts = [] if made is None else list(made.modules())
    return any(isinstance(p, nn.Embedding) and p.num_embeddings == size for p in parts)


def _num_prefix(around: list[nn.Module], settings: Settings) -> int:
    """How many tokens come first that are not of the input, or stand for all of it."""
    if settings.num_prefix is not None:
        return settings.num_prefix
    made = _embeddings(around)
    if made is None:
        raise ValueError(
            "the module does not say how many class and register tokens come first: pass "
            "num_prefix to tokred.patch"
        )
    count = 0
    for name, parameter in made.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in _CLASS_TOKENS:
            count += 1
        elif last == _REGISTERS:
            count += parameter.shape[-2]
        elif last.endswith(("_token", "_tokens")) and last not in _NO_TOKENS:
            raise ValueError(
                f"{type(made).__name__} adds {last}, which the adapter does not know: pass "
                "num_prefix to tokred.patch where they come first"
            )
    text = isinstance(made, nn.Embedding) or any(
        isinstance(part, nn.Embedding) and part.padding_idx is not None for part in made.modules()
    )
    return count or int(text)


# ---- One layer ----------------------------------------------------------------------------------


def _layer_forward(
    state: TokenState,
    shape: LayerShape | None,
    index: int,
    layer: nn.Module,
    original: Callable,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    given = dict(zip(parameters_of(layer)[0], args, strict=False)) | kwargs
    x = given.pop("hidden_states")
    # Where `original` would checkpoint itself, we do it around all of what we do instead.
    checkpointed = (
        shape is not None
        and compat.forward_checkpoints(type(layer))
        and layer.gradient_checkpointing
        and layer.training
        and torch.is_grad_enabled()
    )
    run = partial(_run_layer, state, shape, index, layer, original, checkpointed, given)
    return layer._gradient_checkpointing_func(run, x) if checkpointed else run(x)


def _run_layer(
    state: TokenState,
    shape: LayerShape | None,
    index: int,
    layer: nn.Module,
    original: Callable,
    checkpointed: bool,
    given: dict[str, Any],
    x: Tensor,
) -> Tensor:
    reads_mask = index == 0 and state.layers
    x = state.enter(x, index, _padding(layer, given, x) if reads_mask else None)
    first = state.first()
    if first is not None:
        given = given | _rotations(given, first, state)
    if shape is not None and (checkpointed or state.reduces(index)):
        attention = getattr(layer, shape.attention)
        passed = accepted(attention, given)
        found = attention_in(layer)
        assert found is not None
        x = shape.run(
            layer,
            x,
            lambda hidden: first_of(attention(hidden, **passed)),
            lambda y: state.reduce(y, index, _scale(found[1])) if state.reduces(index) else y,
        )
    else:
        x = original(x, **given)
    return state.leave(x, index)


def _scale(attention: nn.Module) -> float:
    """The scale of the logits of an attention module."""
    for name in ("scaling", "scale"):
        if isinstance(getattr(attention, name, None), float):
            return getattr(attention, name)
    for name in ("head_dim", "attention_head_size"):
        if hasattr(attention, name):
            return 1 / math.sqrt(getattr(attention, name))
    raise ValueError(f"{type(attention).__name__} does not say how it scales its logits")


def _positions(layer: nn.Module) -> bool:
    """Whether the attention of a layer needs to know where its tokens were."""
    found = attention_in(layer)
    windowed = found is not None and getattr(found[1], "sliding_window", None) is not None
    return windowed or "position_embeddings" in parameters_of(layer)[0]


def _rotations(given: dict[str, Any], first: Tensor, state: TokenState) -> dict[str, Any]:
    """The rotations of the tokens that are left: each has that of its first member."""
    rotations = given.get("position_embeddings")
    if rotations is None:
        return {}
    tokens = state.counts_of_pass[0]
    return {
        "position_embeddings": tuple(
            following(table, first, tokens, state.num_prefix) for table in rotations
        )
    }


# ---- Masks --------------------------------------------------------------------------------------


def _visible(mask: Any) -> Tensor:
    """bool, True is visible, of the masks that transformers makes.

    Raises:
        ValueError: a mask of another kind, or one that adds to the logits.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"merging reads masks that are tensors, got {type(mask).__name__}: choose another "
            "attn_implementation than flex_attention"
        )
    if not mask.is_floating_point() or mask.dim() == 2:
        return mask.bool()
    visible = mask == 0
    if not bool((visible | (mask <= -1e4)).all()):
        raise ValueError(
            "attention_mask adds a bias to the logits, which cannot follow tokens that merge: only "
            "padding can be masked"
        )
    return visible


def _padding(layer: nn.Module, given: dict[str, Any], x: Tensor) -> Tensor | None:
    """bool [B, N], the tokens of a batch that are no padding; None where all are.

    Raises:
        ValueError: a mask that is not one of padding; any under torch.compile.
    """
    if given.get("head_mask") is not None:
        raise ValueError("layers that merge tokens take no head_mask")
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "how many tokens a padded row has is read on the host, which cannot be compiled: give "
            "the model rows of one length, without attention_mask"
        )
    visible = _visible(mask)
    if visible.dim() == 4:
        rows, visible = visible, visible.any(1).any(1)
        found = attention_in(layer)
        windowed = found is not None and getattr(found[1], "sliding_window", None) is not None
        if not windowed and not torch.equal(rows, visible[:, None, None].expand_as(rows)):
            raise ValueError(
                "attention_mask hides other tokens from some queries than from others: only "
                "padding can be masked where tokens merge"
            )
    return None if bool(visible.all()) else visible.expand(x.shape[:2])


def _window(mask: Any, first: Tensor) -> Tensor:
    """The mask [B | 1, 1, N0, N0] of a layer with a window, for the tokens that are left, which are
    where their first members were: bool [B, 1, N, N]."""
    visible = _visible(mask).expand(first.shape[0], -1, -1, -1)
    tokens, count = visible.shape[-1], first.shape[1]
    visible = visible.gather(2, first[:, None, :, None].expand(-1, visible.shape[1], -1, tokens))
    return visible.gather(3, first[:, None, None].expand(-1, visible.shape[1], count, -1))


# ---- Attention ----------------------------------------------------------------------------------


def _register(original: str) -> str:
    """The name under which attention of that name runs in encoders that merge."""
    name = f"{_PREFIX}{original}"
    AttentionInterface.register(name, partial(_attention_forward, original))
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _attention_forward(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """The attention of that name, until tokens have merged: then `biased_attention`."""
    state = vars(module).get("tokred_state")
    if state is None:
        return _attention(original, module)(module, query, key, value, attention_mask, **kwargs)
    for name, heads in (("q", query), ("k", key), ("v", value)):
        state.keep_projection(name, heads, _as_they_are)
    by_size, first = state.key_bias(), state.first()
    bias = state.hides() if by_size is None else by_size
    window = None
    if kwargs.get("sliding_window") is not None and first is not None:
        window = None if attention_mask is None else _window(attention_mask, first)
    if bias is None and window is None:
        if attention_mask is not None and state.has_reduced():
            attention_mask = None  # it hides nothing, but is as large as the tokens were
            kwargs["is_causal"] = False  # which sdpa assumes without a mask
        return _attention(original, module)(module, query, key, value, attention_mask, **kwargs)
    _refuse_weights(module, kwargs)
    out, lse = tokred.biased_attention(
        query, key, value, key_bias=bias, scale=kwargs.get("scaling"), mask=window,
        softcap=kwargs.get("softcap"),
    )  # fmt: skip
    if by_size is not None and window is None:
        state.keep_lse(lse)
    return out.transpose(1, 2).contiguous(), None


def _attention(name: str, module: nn.Module) -> Callable[..., Any]:
    """The module's attention of that name; eager attention is a function of the model's file."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]


def _as_they_are(heads: Tensor) -> Tensor:
    return heads


def _refuse_weights(attention: nn.Module, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions", getattr(attention.config, "output_attentions", False)):
        raise ValueError(
            "proportional attention never forms the attention weights: drop output_attentions, "
            "or patch with prop_attn=False and the eager attention implementation"
        )
    for name in ("s_aux", "position_bias", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise ValueError(f"layers that see merged tokens cannot attend with {name}")
    if kwargs.get("dropout"):
        raise ValueError(
            "proportional attention has no dropout, but the config's is "
            f"{kwargs['dropout']}: set it to 0, call model.eval(), or patch with prop_attn=False"
        )


def _pooling_head_forward(
    state: TokenState,
    head: nn.Module,
    original: Callable,
    hidden_state: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    weight = state.final_weight(hidden_state)
    if weight is None:
        mask = () if attention_mask is None else (attention_mask,)
        return original(hidden_state, *mask)
    probe = head.probe.repeat(hidden_state.shape[0], 1, 1)
    # A float padding mask is added to the logits.
    pooled, _ = head.attention(
        probe, hidden_state, hidden_state, key_padding_mask=weight.to(hidden_state.dtype),
        need_weights=False,
    )  # fmt: skip
    pooled = pooled + head.mlp(head.layernorm(pooled))
    return pooled[:, 0]
