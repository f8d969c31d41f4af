"""Packed caches in safetensors files.

The tensors are `<layer>.<name>`, the rows that hold tokens; the metadata say how to read them:
format and version, a checksum, and the header of header.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .contents import Contents
from .header import Header, LayerHeader, layer_tensors, parse
from .layers import PackedCacheLayer
from .storage import CacheOptions
from .support import head_dim_of, kv_heads_of

FORMAT = "tokred.PackedCache"
VERSION = "3"


def save_layers(
    path: str | os.PathLike, layers: list[Any], options: CacheOptions, capacity: int | None
) -> None:
    """See PackedCache.save."""
    headers = [_describe(layer) for layer in layers]
    tensors = {
        f"{number}.{name}": part.contiguous().cpu()
        for number, layer in enumerate(layers)
        for name, part in _parts(layer).items()
    }
    content = json.dumps(
        {
            "options": asdict(options),
            "capacity": capacity,
            "layers": [header.fields() for header in headers],
        }
    )
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "content": content,
        "checksum": _checksum(content, tensors),
    }
    # A file that was there stays until this one is whole.
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as beside:
        whole = os.path.join(beside, name)
        save_file(tensors, whole, metadata)
        os.replace(whole, path)


def load_layers(
    path: str | os.PathLike,
    config: Any,
    device: torch.device | str,
    make: Callable[[Any, CacheOptions, int | None], Any],
) -> Any:
    """See PackedCache.load; make(config, options, capacity) gives an empty cache."""
    device = torch.device(device)
    metadata, tensors = _read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of a {FORMAT}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')}, this reads {VERSION}")
    content = metadata.get("content", "")
    if metadata.get("checksum") != _checksum(content, tensors):
        raise ValueError(f"{path} is damaged: its checksum does not fit its contents")
    try:
        header = parse(content)
        _check_tensors(header, tensors)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        cache = make(config, header.options, header.capacity)
        _check_model(cache.layers, header, config)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error
    for number, (layer, described) in enumerate(zip(cache.layers, header.layers, strict=True)):
        if described.shape:
            names = layer_tensors(header.options, described)
            parts = {name: tensors[f"{number}.{name}"].to(device, copy=True) for name in names}
            _fill(layer, described, parts, device)
    return cache


def _read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors; the latter map the file."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except OSError:
        raise
    except Exception as error:  # the reader raises many kinds for bytes that make no sense
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def _checksum(content: str, tensors: dict[str, Tensor]) -> str:
    total = zlib.crc32(content.encode())
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _kind(layer: Any) -> str:
    if isinstance(layer, PackedCacheLayer):
        return "packed"
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding"
    if type(layer).__name__ == "DummyLayer":  # of layers that cache nothing; new in 5.24
        return "none"
    raise ValueError(
        f"layers of class {type(layer).__name__} cannot be saved, only packed ones and those with "
        "a sliding window"
    )


def _parts(layer: Any) -> dict[str, Tensor]:
    """The tensors of a layer, without the room that holds no tokens."""
    if isinstance(layer, PackedCacheLayer):
        return {} if layer.contents is None else layer.contents.live(layer.length)
    # transformers' layers begin with a tensor of no dimensions to speak of.
    if _kind(layer) == "none" or not layer.is_initialized or layer.keys.dim() != 4:
        return {}
    start = 1 - layer.sliding_window
    return {"keys": layer.keys[:, :, start:], "values": layer.values[:, :, start:]}


def _describe(layer: Any) -> LayerHeader:
    """What is needed to read the tensors of a layer."""
    kind = _kind(layer)
    if kind == "none":
        return LayerHeader(kind)
    length = layer.get_seq_length()
    window = layer.sliding_window if kind == "sliding" else None
    parts = _parts(layer)
    if not parts:
        return LayerHeader(kind, sliding_window=window)
    if kind == "sliding":
        keys, values = parts["keys"], parts["values"]
        dtypes: tuple[torch.dtype, ...] = (keys.dtype, values.dtype)
        dims = (keys.shape[3], values.shape[3])
        batch, heads = keys.shape[:2]
    else:
        contents = layer.contents
        dtypes, batch, heads = (contents.dtype,), contents.batch, contents.heads
        dims = contents.layout.head_dim, contents.layout.value_dim
    return LayerHeader(
        kind,
        length,
        tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        (batch, heads, *dims),
        window,
        "key_mean" in parts,
        layer.rank if kind == "packed" else 0,
    )


def _check_tensors(header: Header, tensors: dict[str, Tensor]) -> None:
    """Whether the file has the tensors that its header describes, and no others."""
    expected = {
        f"{number}.{name}": described
        for number, layer in enumerate(header.layers)
        for name, described in layer_tensors(header.options, layer).items()
    }
    if tensors.keys() != expected.keys():
        missing, more = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        raise ValueError(f"it lacks the tensors {sorted(missing)} and has {sorted(more)} beside")
    for name, (dtype, shape) in expected.items():
        if (tensors[name].dtype, tuple(tensors[name].shape)) != (dtype, shape):
            raise ValueError(
                f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}, not {dtype} "
                f"{list(shape)}"
            )


def _check_model(layers: list[Any], header: Header, config: Any) -> None:
    """Whether the model has such layers, as far as its config tells."""
    if len(layers) != len(header.layers):
        raise ValueError(f"it has {len(header.layers)} layers, the model has {len(layers)}")
    for number, (layer, described) in enumerate(zip(layers, header.layers, strict=True)):
        expected: dict[str, Any] = {"kind": _kind(layer)}
        found: dict[str, Any] = {"kind": described.kind}
        if described.kind == expected["kind"] == "sliding":
            expected["sliding_window"] = layer.sliding_window
            found["sliding_window"] = described.sliding_window
        if described.kind == "packed" and described.shape:
            expected["num_key_value_heads"] = kv_heads_of(config, number)
            expected["head_dim"] = head_dim_of(config, number)
            found["num_key_value_heads"], found["head_dim"] = described.shape[1:3]
            expected["channels of latents"] = getattr(layer, "rank", None)
            found["channels of latents"] = described.rank
        for name, value in expected.items():
            if value is not None and found[name] != value:
                raise ValueError(
                    f"layer {number} of the file has {name} {found[name]}, the model's has {value}"
                )


def _fill(
    layer: Any, described: LayerHeader, parts: dict[str, Tensor], device: torch.device
) -> None:
    """Puts the tensors into an empty layer, which owns them from then on."""
    if described.kind == "sliding":
        layer.update(parts["keys"], parts["values"])
        layer.cumulative_length = described.length
        return
    batch, heads, *dims = described.shape
    layout = layer.options.layout(*dims)
    room = layout.packed_tokens(described.length)
    contents = Contents.empty(layout, batch, heads, room, described.torch_dtypes[0], device)
    if described.centered:
        contents = contents.with_mean(parts["key_mean"])
    for name, rows in contents.live(described.length).items():
        rows.copy_(parts[name])
    layer.restore(contents, described.length)
