"""Which models a packed cache serves, as far as their configs tell."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred.integrations.transformers.full_attention import (
    explain,
    full_attention,
    reads_cache_itself,
)

from .storage import CacheOptions

_INSTEAD = "use a transformers.DynamicCache"


def check_model(config: Any, options: CacheOptions, packed: list[int]) -> None:
    """Refuses a model whose attention cannot read packed keys in these layers.

    Raises:
        ValueError: saying why, and what would work.
    """
    text = text_config(config)
    name = type(config).__name__
    latent = latent_dims(config)
    if latent is not None and options.center:
        raise ValueError(
            f"center packs keys without their mean, and the latents of {name} are its values as "
            "well: pass center=False"
        )
    if latent is not None and options.value_bits != options.key_bits:
        raise ValueError(
            f"the latents of {name} are keys and values at once, so value_bits must be key_bits, "
            f"got {options.value_bits} and {options.key_bits}"
        )
    if options.center and softcap_of(config) is not None:
        raise ValueError(
            f"center packs keys without their mean, which a softcap of their logits needs, and "
            f"{name} has attn_logit_softcapping = {softcap_of(config)}: pass center=False"
        )
    if getattr(text, "cross_attention_layers", None):
        raise ValueError(
            f"PackedCache packs tokens of text, and {name} keeps the states of images in the same "
            f"cache, in layers {list(text.cross_attention_layers)}: {_INSTEAD}"
        )
    for number in packed:
        head_dim = head_dim_of(config, number)
        if head_dim is not None:
            try:
                options.layout(head_dim, head_dim if latent is None else 0)
            except ValueError as error:
                raise ValueError(f"layer {number} of {name}: {error}") from error


def latent_dims(config: Any) -> tuple[int, int] | None:
    """Channels of the latents and of the rotary parts of keys that a model caches; None of others.

    Which it caches of multi-head latent attention, whose config has their names.
    """
    text = text_config(config)
    dims = (getattr(text, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    rank, rotary = (dim if isinstance(dim, int) else 0 for dim in dims)
    return (rank, rotary) if rank > 0 and rotary > 0 else None


def softcap_of(config: Any) -> float | None:
    """The softcap of the decoder's logits, or None."""
    return getattr(text_config(config), "attn_logit_softcapping", None)


def config_of(model: Any) -> Any:
    """The config of a model, or the config that it is.

    Raises:
        TypeError: it is neither.
    """
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"a cache needs a model of transformers or its config, got {type(model).__name__}"
        )
    return config


def check_layers(model: nn.Module) -> None:
    """Refuses a model whose attention does not read its cache through tokred's.

    Raises:
        ValueError: saying which, and what would work.
    """
    for module in model.modules():
        if reads_cache_itself(module):
            raise ValueError(
                f"{type(module).__name__} computes with cached keys in its own code, and packed "
                f"ones are read through transformers' attention interface: {_INSTEAD}"
            )
    if not full_attention(model, chooses=False):
        raise ValueError(
            f"PackedCache serves causal attention to all keys, and {type(model).__name__} has "
            f"none ({explain(model)}): {_INSTEAD}"
        )


def text_config(config: Any) -> Any:
    """The config of the decoder."""
    return config.get_text_config(decoder=True)


def layer_config(config: Any, number: int) -> Any:
    """The decoder's config as it is for one layer; before transformers 5.24 all are alike."""
    text = text_config(config)
    each = getattr(text, "per_layer_config", None)
    return text if each is None else each[number]


def head_dim_of(config: Any, number: int) -> int | None:
    """The head dimension of a layer of full attention, or None where the config does not say.

    Of multi-head latent attention that of its one key head.
    """
    latent = latent_dims(config)
    if latent is not None:
        return sum(latent)
    layer = layer_config(config, number)
    for name in ("global_head_dim", "head_dim"):
        if isinstance(getattr(layer, name, None), int):
            return getattr(layer, name)
    hidden, heads = (getattr(layer, n, None) for n in ("hidden_size", "num_attention_heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def kv_heads_of(config: Any, number: int) -> int | None:
    """The key heads of a layer of full attention, or None where the config does not say."""
    if latent_dims(config) is not None:
        return 1
    layer = layer_config(config, number)
    if getattr(layer, "num_global_key_value_heads", None) is not None:
        return None
    heads = getattr(layer, "num_key_value_heads", None)
    return heads if isinstance(heads, int) else None
