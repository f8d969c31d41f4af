"""transformers: ViT, DeiT, DINOv2 (with and without registers), SigLIP and CLIP vision models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import tokred
from tokred import compat
from tokred.integrations.walk import ancestors, layer_lists
from tokred.patching import Overrides, Settings, TokenReducer, TokenState

Step = Callable[[torch.Tensor], torch.Tensor]


def _vit_layer(layer: nn.Module, x: torch.Tensor, attend: Step, reduce: Step) -> torch.Tensor:
    x = reduce(layer.dropout(attend(layer.layernorm_before(x))) + x)
    return layer.dropout(layer.mlp(layer.layernorm_after(x))) + x


def _dinov2_layer(layer: nn.Module, x: torch.Tensor, attend: Step, reduce: Step) -> torch.Tensor:
    x = reduce(layer.drop_path(layer.layer_scale1(attend(layer.norm1(x)))) + x)
    return layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x)))) + x


def _clip_layer(layer: nn.Module, x: torch.Tensor, attend: Step, reduce: Step) -> torch.Tensor:
    x = reduce(x + attend(layer.layer_norm1(x)))
    return x + layer.mlp(layer.layer_norm2(x))


@dataclass(frozen=True)
class Family:
    """How a family of models names the parts of a layer."""

    forward: Callable[[nn.Module, torch.Tensor, Step, Step], torch.Tensor]
    attention: str
    output: str
    scale: str
    dropout: str
    num_prefix: Callable[[Any], int]


# The models that take any number of tokens from these layers. Every other one of transformers,
# such as those that estimate depth, fill in masked patches or put a text around an image, reads
# its tokens as a grid or counts them.
_CLASSIFIERS = ("Encoder", "Model", "ForImageClassification")
_TAKE_FEWER = {
    *(f"{kind}{end}" for kind in ("ViT", "DeiT", "CLIP", "Siglip") for end in _CLASSIFIERS),
    *(f"Dinov2{registers}{end}" for registers in ("", "WithRegisters") for end in _CLASSIFIERS),
    *(f"{kind}Vision{end}" for kind in ("CLIP", "Siglip") for end in ("Model", "Transformer")),
    "DeiTForImageClassificationWithTeacher",
    "CLIPVisionModelWithProjection",
    "VisionTextDualEncoderModel",
    "VisionEncoderDecoderModel",
}

_VIT_NAMES = ("attention", "o_proj", "scaling", "attention_dropout")
_CLIP_NAMES = ("self_attn", "out_proj", "scale", "dropout")

FAMILIES = {
    "vit.modeling_vit.ViTLayer": Family(_vit_layer, *_VIT_NAMES, lambda config: 1),
    "deit.modeling_deit.DeiTLayer": Family(_vit_layer, *_VIT_NAMES, lambda config: 2),
    "dinov2.modeling_dinov2.Dinov2Layer": Family(_dinov2_layer, *_VIT_NAMES, lambda config: 1),
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": Family(
        _dinov2_layer, *_VIT_NAMES, lambda config: 1 + config.num_register_tokens
    ),
    "siglip.modeling_siglip.SiglipEncoderLayer": Family(
        _clip_layer, *_CLIP_NAMES, lambda config: 0
    ),
    "clip.modeling_clip.CLIPEncoderLayer": Family(_clip_layer, *_CLIP_NAMES, lambda config: 1),
}


def _family(layer: nn.Module) -> Family | None:
    """The family of a vision layer; text layers of CLIP and SigLIP have none."""
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models.")
    family = FAMILIES.get(name)
    if family is not None and "Dinov2" in name and not compat.has_flat_dinov2():
        raise ValueError(
            f"{kind.__name__} of this release of transformers is built in another way: merging in "
            "DINOv2 needs transformers 5.18 or newer"
        )
    if family is None or "Text" in type(getattr(layer, family.attention).config).__name__:
        return None
    return family


@dataclass(frozen=True)
class Stack:
    """The layers of one encoder, and the attention pooling above it, if it has one."""

    layers: list[nn.Module]
    family: Family
    num_prefix: int
    pooling_head: nn.Module | None

    def install(self, method: TokenReducer, settings: Settings, overrides: Overrides) -> TokenState:
        """Puts the method into the layers; returns their state."""
        state = TokenState(method, len(self.layers), self.num_prefix, settings)
        family = self.family
        for index, layer in enumerate(self.layers):
            attn = getattr(layer, family.attention)
            in_forward = compat.forward_checkpoints(type(layer))
            overrides.replace(
                layer, "forward", _layer_forward, state, family, index, in_forward, layer
            )
            overrides.replace(attn, "forward", _attention_forward, state, family, attn)
            if state.reduces(index):
                in_heads = partial(_heads, attn.head_dim)
                for name in ("q", "k", "v"):
                    projection = getattr(attn, f"{name}_proj")
                    overrides.hook(projection, partial(_keep, state, name, in_heads))
        if self.pooling_head is not None and settings.prop_attn:
            head = self.pooling_head
            overrides.replace(head, "forward", _pooling_head_forward, state, head)
        return state


def stacks(model: nn.Module, method: TokenReducer, settings: Settings) -> Iterator[Stack]:
    """The vision encoders in the model.

    Raises:
        ValueError: a model that needs the whole grid of tokens, or an unsupported option.
    """
    for name, layers in layer_lists(model, lambda layer: _family(layer) is not None):
        around = list(ancestors(model, name))
        if method.layers(len(layers)):
            _refuse_grids(around)
        if settings.weighted_pool:
            raise ValueError("weighted_pool is for timm models; these pool inside their forward")
        family = _family(layers[0])
        num_prefix = settings.num_prefix
        if num_prefix is None:
            num_prefix = family.num_prefix(getattr(layers[0], family.attention).config)
        heads = [getattr(module, "head", None) for module in around]
        kind = "SiglipMultiheadAttentionPoolingHead"
        head = next((head for head in heads if type(head).__name__ == kind), None)
        yield Stack(layers, family, num_prefix, head)


def _refuse_grids(around: list[nn.Module]) -> None:
    """Refuses the models of transformers that need every token."""
    for module in around:
        names = [
            kind.__name__
            for kind in type(module).__mro__
            if kind.__module__.startswith("transformers.models.")
        ]
        if names and names[0] not in _TAKE_FEWER:
            raise ValueError(
                f"{names[0]} needs every token of its vision encoder, as a grid or as many as it "
                "has places for: patch models that pool them, such as "
                "ViTForImageClassification, Dinov2Model and CLIPModel"
            )


def _keep(
    state: TokenState,
    name: str,
    in_heads: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    args: Any,
    output: torch.Tensor,
) -> None:
    state.keep_projection(name, output, in_heads)


def _heads(head_dim: int, projected: torch.Tensor) -> torch.Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _layer_forward(
    state: TokenState,
    family: Family,
    index: int,
    in_forward: bool,
    layer: nn.Module,
    original: Callable,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    # Where `original` would checkpoint itself, we do it around all of what we do instead.
    checkpointed = (
        in_forward and layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    )
    run = partial(_run_layer, state, family, index, layer, original, checkpointed, **kwargs)
    if checkpointed:
        return layer._gradient_checkpointing_func(run, hidden_states, attention_mask)
    return run(hidden_states, attention_mask)


def _run_layer(
    state: TokenState,
    family: Family,
    index: int,
    layer: nn.Module,
    original: Callable,
    checkpointed: bool,
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    state.enter(x, index)
    reduces = state.reduces(index)
    if reduces:
        _refuse_masks(attention_mask, kwargs)
    if reduces or checkpointed:
        attention = getattr(layer, family.attention)
        scale = getattr(attention, family.scale)
        x = family.forward(
            layer,
            x,
            lambda x: attention(x, attention_mask=attention_mask, **kwargs)[0],
            lambda x: state.reduce(x, index, scale) if reduces else x,
        )
    else:
        x = original(x, attention_mask, **kwargs)
    state.leave(x, index)
    return x


def _attention_forward(
    state: TokenState,
    family: Family,
    attn: nn.Module,
    original: Callable,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = state.key_bias()
    if bias is None:
        return original(hidden_states, attention_mask=attention_mask, **kwargs)
    _refuse_masks(attention_mask, kwargs)
    _refuse_weights(attn, family, kwargs)
    q = _heads(attn.head_dim, attn.q_proj(hidden_states))
    k = _heads(attn.head_dim, attn.k_proj(hidden_states))
    v = _heads(attn.head_dim, attn.v_proj(hidden_states))
    scale = getattr(attn, family.scale)
    out, lse = tokred.biased_attention(q, k, v, key_bias=bias, scale=scale)
    state.keep_lse(lse)
    return getattr(attn, family.output)(out.transpose(1, 2).flatten(2)), None


def _refuse_masks(attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None or kwargs.get("head_mask") is not None:
        raise ValueError("layers that see merged tokens take no attention_mask and no head_mask")


def _refuse_weights(attn: nn.Module, family: Family, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions", getattr(attn.config, "output_attentions", False)):
        raise ValueError(
            "proportional attention never forms the attention weights: drop output_attentions, "
            "or patch with prop_attn=False and the eager attention implementation"
        )
    dropout = getattr(attn, family.dropout)
    if attn.training and dropout > 0:
        raise ValueError(
            f"proportional attention has no dropout, but the config's is {dropout}: set it to 0, "
            "call model.eval(), or patch with prop_attn=False"
        )


def _pooling_head_forward(
    state: TokenState, head: nn.Module, original: Callable, hidden_state: torch.Tensor
) -> torch.Tensor:
    size = state.final_size(hidden_state)
    if size is None:
        return original(hidden_state)
    probe = head.probe.repeat(hidden_state.shape[0], 1, 1)
    # A float padding mask is added to the logits.
    weight = size.log().to(hidden_state.dtype)
    pooled, _ = head.attention(
        probe, hidden_state, hidden_state, key_padding_mask=weight, need_weights=False
    )
    pooled = pooled + head.mlp(head.layernorm(pooled))
    return pooled[:, 0]
