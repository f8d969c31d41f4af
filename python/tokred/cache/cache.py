"""The packed cache of a model."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from tokred.integrations.transformers import attention

from .base import InPlaceCache, check_capacity, replaced_layers
from .files import load_layers, save_layers
from .latents import LatentCacheLayer
from .layers import PackedCacheLayer
from .storage import CacheOptions
from .support import check_layers, check_model, config_of, latent_dims, softcap_of


class PackedCache(InPlaceCache):
    """A cache of low-bit keys and values for transformers' generate.

        cache = tokred.PackedCache(model, bits=4)  # tells transformers of the attention
        model.set_attn_implementation("tokred")
        model.generate(**inputs, cache=cache)

    (before transformers 5.24 the keyword is `past_key_values`).

    Full-attention layers are packed; layers with a sliding window, and others that keep no growing
    cache, stay transformers' own in full precision. The first tokens attend to one another in full
    precision and are packed afterwards (KIVI, arXiv:2402.02750); later ones attend to the packed
    cache, and several at a time to one another in full precision. Left padding, beams, prompts in
    several parts, assisted generation and autocast work as with a DynamicCache; see
    PackedCacheLayer.crop for what rolling back costs. A call that raises leaves the cache as it
    was.

    Of multi-head latent attention (DeepSeek-V2 and its kin) it packs the latents with the rotary
    parts of the keys, one row a token for all heads, which is keys and values at once: bits and
    groups are those of keys. Later tokens attend with the weights absorbed that would expand it.

    An encoder-decoder's decoder has it in `EncoderDecoderCache(PackedCache(config),
    DynamicCache(config=config))` of transformers.

    Args:
        config: of the model; or the model itself, of which it is also seen whether its layers read
            the cache through transformers' attention interface.
        bits: 1, 2, 3, 4 or 8; key_bits, value_bits: of one side, `bits` where None.
        key_axis: "channel", groups of neighbouring channels of a token, or "token", groups of
            tokens of a channel, as KIVI packs keys; by default the latter below 4 bits, unless the
            scheme is "codebook". Values are always packed along channels.
        group_size: numbers that share a scale; by default 32 along tokens, and along channels 64,
            32 below 4 bits, or what of it divides the head dimension; of a codebook all of a row.
        window: the last tokens, which are kept in full precision; along tokens a multiple of the
            group. 32 by default, 64 below 4 bits, or the next multiple of the group.
        scheme: "asymmetric", "zero_point", "symmetric", "fp8" or "codebook"; see `kv_pack`.
        rotate: packs after a Hadamard rotation (QuaRot, arXiv:2404.00456).
        center: packs keys without their mean over the tokens that were there when packing began,
            for every row of the batch and head (SageAttention, arXiv:2410.02367): a bias of the
            key projection would take most of a group's range. Subtracting it changes all logits of
            a query by the same amount, so attention stays that to the whole keys. On by default
            where groups lie along channels, and only where packing begins with 16 tokens or more;
            along tokens every group has a minimum of its own. Off, and refused, where the model has
            a softcap of its logits.
        capacity: tokens to make room for at once, and no more; grows by a sixteenth where None.

    Raises:
        ValueError: options that do not fit each other; a model without full-attention layers, or
            whose attention cannot read packed keys (a head dimension that is no multiple of 16 up
            to 256, of latents with their rotary part up to 576). What the config does not tell is
            checked with the first tokens.
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        *,
        key_bits: int | None = None,
        value_bits: int | None = None,
        key_axis: str | None = None,
        group_size: int | None = None,
        window: int | None = None,
        scheme: str = "asymmetric",
        rotate: bool = True,
        center: bool | None = None,
        capacity: int | None = None,
    ) -> None:
        model, config = config, config_of(config)
        if isinstance(model, nn.Module):
            check_layers(model)
        if center is None and (softcap_of(config) is not None or latent_dims(config) is not None):
            center = False
        options = _options(
            bits, key_bits, value_bits, key_axis, group_size, window, scheme, rotate, center
        )
        check_capacity(capacity)
        self.options = options
        self.capacity = capacity
        super().__init__(layers=_layers(config, options, capacity))
        attention.register()

    def bytes_per_token(self) -> float:
        """All bytes, divided by the tokens of all rows of the batch; 0 of an empty cache.

        Raises:
            ValueError: a method has evicted tokens, and heads may hold different numbers of them.
        """
        packed = next((each for each in self.layers if isinstance(each, PackedCacheLayer)), None)
        if packed is None:
            raise ValueError("tokens were evicted from this cache: nbytes() counts what is left")
        if packed.contents is None or packed.length == 0:
            return 0.0
        return self.nbytes().total / (packed.length * packed.contents.batch)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file with the tokens, which `load` brings back bit for bit.

        What crop needs to be exact (see PackedCacheLayer.crop) is not part of it.

        Raises:
            ValueError: the model has layers that are neither packed nor have a sliding window.
        """
        save_layers(path, self.layers, self.options, self.capacity)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: Any, device: torch.device | str | None = None
    ) -> PackedCache:
        """The cache that `save` wrote, on a device, by default the CPU; config as above.

        Raises:
            ValueError: a file that is damaged, or of a model with other layers.
            OSError: a file that cannot be read.
        """
        return load_layers(path, config_of(config), device or "cpu", cls._from_options)

    @classmethod
    def _from_options(cls, config: Any, options: CacheOptions, capacity: int | None) -> PackedCache:
        return cls(config, options.key_bits, **asdict(options), capacity=capacity)


def _options(
    bits: int,
    key_bits: int | None,
    value_bits: int | None,
    key_axis: str | None,
    group_size: int | None,
    window: int | None,
    scheme: str,
    rotate: bool,
    center: bool | None,
) -> CacheOptions:
    """The options with their defaults."""
    key_bits = bits if key_bits is None else key_bits
    value_bits = bits if value_bits is None else value_bits
    few = any(isinstance(each, int) and each < 4 for each in (key_bits, value_bits))
    if key_axis is None:
        key_axis = "token" if few and scheme != "codebook" else "channel"
    if window is None:
        window = 64 if few else 32
        if key_axis == "token" and isinstance(group_size, int) and group_size > 0:
            window = -(-window // group_size) * group_size
    center = key_axis == "channel" if center is None else center
    return CacheOptions(key_bits, value_bits, key_axis, group_size, window, scheme, rotate, center)


def _layers(config: Any, options: CacheOptions, capacity: int | None) -> list[Any]:
    """transformers' own layers for the config, those of full attention replaced."""
    refusal = (
        f"PackedCache packs layers of full attention, and {type(config).__name__} has none: "
        "use a transformers.DynamicCache"
    )
    latent = latent_dims(config)
    make = PackedCacheLayer if latent is None else partial(LatentCacheLayer, *latent)
    packed = replaced_layers(config, partial(make, options, capacity), refusal)
    numbers = [n for n, layer in enumerate(packed) if isinstance(layer, PackedCacheLayer)]
    check_model(config, options, numbers)
    return packed
