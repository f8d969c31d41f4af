"""The packed cache of a model."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from tokred.models import attention

from .files import load_layers, save_layers
from .layers import CacheBytes, PackedCacheLayer
from .storage import CacheOptions


class PackedCache(Cache):
    """A cache of low-bit keys and values for transformers' generate.

        model.set_attn_implementation("tokred")
        model.generate(**inputs, past_key_values=tokred.PackedCache(model.config, bits=4))

    Full-attention layers are packed; layers with a sliding window, and others that keep no growing
    cache, stay transformers' own in full precision. The first tokens attend to one another in full
    precision and are packed behind that (KIVI, arXiv:2402.02750); later ones attend to the packed
    cache, and several at a time to one another in full precision. Left padding, beams, prompts in
    several parts, and assisted generation work as with a DynamicCache; see PackedCacheLayer.crop
    for what rolling back costs.

    Args:
        config: of the model.
        bits: 1, 2, 3, 4 or 8; key_bits, value_bits: of one side, `bits` where None.
        key_axis: "channel", groups of neighbouring channels of a token, or "token", groups of
            tokens of a channel, as KIVI packs keys; by default the latter below 4 bits. Values are
            always packed along channels.
        group_size: numbers that share a scale; by default 32 along tokens, and along channels 64,
            32 below 4 bits, or what of it divides the head dimension.
        window: the last tokens, which are kept in full precision; along tokens a multiple of the
            group. 32 by default, 64 below 4 bits, or the next multiple of the group.
        scheme: "asymmetric", "zero_point", "symmetric" or "fp8"; see `kv_pack`.
        rotate: packs after a Hadamard rotation (QuaRot, arXiv:2404.00456).
        capacity: tokens to make room for at once, and no more; grows by a sixteenth where None.

    Raises:
        ValueError: options that do not fit each other, or a model without full-attention layers;
            with the first tokens, a head dimension that is no multiple of 16 up to 256.
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
        capacity: int | None = None,
    ) -> None:
        options = _options(bits, key_bits, value_bits, key_axis, group_size, window, scheme, rotate)
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.options = options
        self.capacity = capacity
        super().__init__(layers=_layers(config, options, capacity))
        attention.register()

    def nbytes(self, layer: int | None = None) -> CacheBytes:
        """What all layers take in bytes, or one; `.total` has everything."""
        if layer is None:
            return sum((_nbytes(each) for each in self.layers), CacheBytes())
        return _nbytes(self.layers[layer])

    def bytes_per_token(self) -> float:
        """All bytes, divided by the tokens of all rows of the batch; 0 of an empty cache."""
        packed = next(each for each in self.layers if isinstance(each, PackedCacheLayer))
        if packed.length == 0:
            return 0.0
        return self.nbytes().total / (packed.length * packed.packed[0].codes.shape[0])

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file with the tokens, which `load` brings back bit for bit.

        Raises:
            ValueError: the model has layers that are neither packed nor have a sliding window.
        """
        save_layers(path, self.layers, self.options, self.capacity)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: Any, device: torch.device | str | None = None
    ) -> PackedCache:
        """The cache that `save` wrote, on a device, by default the CPU.

        Raises:
            ValueError: a file that is damaged, or of a model with other layers; OSError: none.
        """
        return load_layers(path, config, device or "cpu", cls._made)

    @classmethod
    def _made(cls, config: Any, options: dict[str, Any], capacity: int | None) -> PackedCache:
        return cls(config, options["key_bits"], **options, capacity=capacity)


def _options(
    bits: int,
    key_bits: int | None,
    value_bits: int | None,
    key_axis: str | None,
    group_size: int | None,
    window: int | None,
    scheme: str,
    rotate: bool,
) -> CacheOptions:
    """The options with their defaults."""
    key_bits = bits if key_bits is None else key_bits
    value_bits = bits if value_bits is None else value_bits
    few = min(key_bits, value_bits) < 4
    if key_axis is None:
        key_axis = "token" if few else "channel"
    if window is None:
        window = 64 if few else 32
        if key_axis == "token" and group_size:
            window = -(-window // group_size) * group_size
    return CacheOptions(key_bits, value_bits, key_axis, group_size, window, scheme, rotate)


def _layers(config: Any, options: CacheOptions, capacity: int | None) -> list[Any]:
    """transformers' own layers for the config, those of full attention replaced."""
    layers = DynamicCache(config=config).layers
    packed = [
        PackedCacheLayer(options, capacity) if type(layer) is DynamicLayer else layer
        for layer in layers
    ]
    if not any(isinstance(layer, PackedCacheLayer) for layer in packed):
        raise ValueError(
            f"PackedCache packs layers of full attention, and {type(config).__name__} has none: "
            "use a transformers.DynamicCache"
        )
    return packed


def _nbytes(layer: Any) -> CacheBytes:
    if isinstance(layer, PackedCacheLayer):
        return layer.nbytes()
    # The storages: what is a view keeps all of its memory.
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors(vars(layer))
    }
    return CacheBytes(full_precision=sum(storages.values()))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]
