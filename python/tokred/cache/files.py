"""Packed caches in safetensors files.

The tensors are `<layer>.<buffer>`, the rows that hold tokens; the metadata say how to read them:
format and version, the options of the cache, what each layer is, and a checksum of all of it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .layers import PackedCacheLayer
from .storage import CacheOptions

FORMAT = "tokred.PackedCache"
VERSION = "1"


def save_layers(
    path: str | os.PathLike, layers: list[Any], options: CacheOptions, capacity: int | None
) -> None:
    """See PackedCache.save."""
    tensors: dict[str, Tensor] = {}
    described = []
    for number, layer in enumerate(layers):
        parts = _parts(layer)
        described.append(_describe(layer))
        tensors |= {f"{number}.{name}": part.contiguous().cpu() for name, part in parts.items()}
    content = json.dumps({"options": asdict(options), "capacity": capacity, "layers": described})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "content": content,
        "checksum": _checksum(content, tensors),
    }
    save_file(tensors, path, metadata)


def load_layers(
    path: str | os.PathLike,
    config: Any,
    device: torch.device | str,
    make: Callable[[Any, dict[str, Any], int | None], Any],
) -> Any:
    """See PackedCache.load; `make` makes an empty cache of the config, options and capacity."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of a {FORMAT}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')}, this reads {VERSION}")
    content = metadata.get("content", "")
    if metadata.get("checksum") != _checksum(content, tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit its contents")
    try:
        return _cache(path, config, torch.device(device), make, json.loads(content), tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r} in its description") from error


def _cache(
    path: str | os.PathLike,
    config: Any,
    device: torch.device,
    make: Callable[[Any, dict[str, Any], int | None], Any],
    described: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Any:
    """The cache that the file describes."""
    cache = make(config, described["options"], described["capacity"])
    if len(cache.layers) != len(described["layers"]):
        raise ValueError(
            f"{path} has {len(described['layers'])} layers, the model has {len(cache.layers)}"
        )
    for number, (layer, description) in enumerate(
        zip(cache.layers, described["layers"], strict=True)
    ):
        prefix = f"{number}."
        parts = {
            name.removeprefix(prefix): part.to(device)
            for name, part in tensors.items()
            if name.startswith(prefix)
        }
        where = f"layer {number} of {path}"
        _check_kind(where, layer, description, config)
        _fill(where, layer, description, parts, device)
    return cache


def _checksum(content: str, tensors: dict[str, Tensor]) -> str:
    total = zlib.crc32(content.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def _parts(layer: Any) -> dict[str, Tensor]:
    """The tensors of a layer, without the room that holds no tokens."""
    if not layer.is_initialized:
        return {}
    if isinstance(layer, PackedCacheLayer):
        windows = {f"{name}_window": tensor for name, tensor in layer.windows.items()}
        return layer.live_buffers() | windows
    if type(layer) is not DynamicSlidingWindowLayer:
        raise ValueError(
            f"layers of class {type(layer).__name__} cannot be saved, only packed ones and those "
            "with a sliding window"
        )
    start = 1 - layer.sliding_window
    return {"keys": layer.keys[:, :, start:], "values": layer.values[:, :, start:]}


def _describe(layer: Any) -> dict[str, Any]:
    """What is needed to read the tensors of a layer."""
    description: dict[str, Any] = {"kind": _kind(layer), "length": layer.get_seq_length()}
    if layer.is_initialized:
        description["dtype"] = str(layer.dtype).removeprefix("torch.")
    if isinstance(layer, PackedCacheLayer) and layer.is_initialized:
        batch, heads = layer.packed[0].codes.shape[:2]
        dims = layer.layout.head_dim, layer.layout.value_dim
        description["shape"] = [batch, heads, *dims]
    if isinstance(layer, DynamicSlidingWindowLayer):
        description["sliding_window"] = layer.sliding_window
    return description


def _kind(layer: Any) -> str:
    return "packed" if isinstance(layer, PackedCacheLayer) else type(layer).__name__


def _check_kind(where: str, layer: Any, description: dict[str, Any], config: Any) -> None:
    """Whether the model has such a layer, as far as its config tells."""
    expected = {"kind": _kind(layer)}
    found = {"kind": description["kind"]}
    if isinstance(layer, DynamicSlidingWindowLayer):
        expected["sliding_window"] = layer.sliding_window
        found["sliding_window"] = description.get("sliding_window")
    if "shape" in description:
        text = config.get_text_config(decoder=True)
        names = "num_key_value_heads", "head_dim"
        for name, value in zip(names, description["shape"][1:3], strict=True):
            if isinstance(getattr(text, name, None), int):
                expected[name], found[name] = getattr(text, name), value
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(f"{where} has {name} {found[name]}, the model's has {value}")


def _fill(
    where: str,
    layer: Any,
    description: dict[str, Any],
    parts: dict[str, Tensor],
    device: torch.device,
) -> None:
    """Puts the tensors into an empty layer."""
    if "dtype" not in description:
        return
    dtype, length = getattr(torch, description["dtype"]), description["length"]
    if not isinstance(layer, PackedCacheLayer):
        batch, heads, tokens, head_dim = parts["keys"].shape
        expected = {"keys": (dtype, [batch, heads, tokens, head_dim])}
        expected["values"] = dtype, [batch, heads, tokens, parts["values"].shape[-1]]
        _check_parts(where, parts, expected)
        layer.lazy_initialization(parts["keys"], parts["values"])
        layer.keys, layer.values = parts["keys"], parts["values"]
        layer.cumulative_length = length
        return
    batch, heads, head_dim, value_dim = description["shape"]
    layout = layer.options.layout(head_dim, value_dim)
    held = layout.packed_tokens(length)
    expected = {
        name: (rows.dtype, [batch, heads, held // rows.tokens, rows.columns])
        for name, rows in layout.buffers().items()
    }
    if layout.window > 0:
        for name, dim in (("key_window", head_dim), ("value_window", value_dim)):
            expected[name] = dtype, [batch, heads, layout.window, dim]
    _check_parts(where, parts, expected)
    layer.allocate(layout, batch, heads, dtype, device)
    layer.make_room(length)
    layer.length = length
    live = layer.live_buffers() | {f"{name}_window": w for name, w in layer.windows.items()}
    for name, rows in live.items():
        rows.copy_(parts[name])


def _check_parts(where: str, parts: dict[str, Tensor], expected: dict[str, Any]) -> None:
    """Whether these are the tensors, each with its dtype and shape."""
    if parts.keys() != expected.keys():
        raise ValueError(f"{where} has the tensors {sorted(parts)}, not {sorted(expected)}")
    for name, description in expected.items():
        if (parts[name].dtype, list(parts[name].shape)) != description:
            raise ValueError(
                f"{name} in {where} is {parts[name].dtype} {list(parts[name].shape)}, not "
                f"{description[0]} {description[1]}"
            )
