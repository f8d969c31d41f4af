"""The header of a packed cache's file: what its layers are, with a check of every field.

A header says how many bytes to allocate and how to read them, so nothing in it is taken on trust:
every field has its type and range, and every size follows from tensors that the file has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch

from tokred.ops.kv_pack import packed_tokens

from .storage import CacheOptions

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_SLIDING_DTYPES = {**_DTYPES, "float64": torch.float64}
_LARGEST = 2**31 - 1  # of lengths and sizes

TensorHeader = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class LayerHeader:
    """One layer; before its first tokens only its kind and its sliding window are set.

    kind: "packed", "sliding", or "none" where a layer caches nothing.
    dtypes: of windows and mean, or of the keys and the values of a sliding layer.
    shape: batch, key heads, and the head dimensions of keys and values.
    centered: whether keys are packed without their mean.
    rank: channels of a row that are its latent, the others being the rotary part of the key; 0
        where keys and values are packed apart.
    """

    kind: str
    length: int = 0
    dtypes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    sliding_window: int | None = None
    centered: bool = False
    rank: int = 0

    def fields(self) -> dict[str, Any]:
        """As JSON has them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def torch_dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(_SLIDING_DTYPES[name] for name in self.dtypes)


@dataclass(frozen=True)
class Header:
    """What a file says of its cache and of every layer."""

    options: CacheOptions
    capacity: int | None
    layers: tuple[LayerHeader, ...]


def parse(content: str) -> Header:
    """The header that the JSON text describes.

    Raises:
        ValueError: naming the field that is missing, unknown, or of another type or range.
    """
    try:
        content = json.loads(content, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    header = _exactly(content, "its header", ("options", "capacity", "layers"))
    names = tuple(each.name for each in fields(CacheOptions))
    options = CacheOptions(**_exactly(header["options"], "options", names))
    capacity = header["capacity"]
    if capacity is not None:
        _integer(capacity, "capacity", 1)
    if not isinstance(header["layers"], list):
        raise ValueError("layers is no list")
    layers = tuple(_layer(each, f"layers[{n}]") for n, each in enumerate(header["layers"]))
    for number, layer in enumerate(layers):
        if capacity is not None and layer.kind == "packed" and layer.length > capacity:
            raise ValueError(f"layers[{number}] has {layer.length} tokens, capacity is {capacity}")
    return Header(options, capacity, layers)


def _layer(value: Any, where: str) -> LayerHeader:
    names = tuple(each.name for each in fields(LayerHeader))
    value = _exactly(value, where, names)
    kind, length = value["kind"], value["length"]
    if kind not in ("packed", "sliding", "none") or not isinstance(kind, str):
        raise ValueError(f"{where}.kind is {kind!r}")
    _integer(length, f"{where}.length", 0)
    if kind == "sliding":
        _integer(value["sliding_window"], f"{where}.sliding_window", 1)
    elif value["sliding_window"] is not None:
        raise ValueError(f"{where}.sliding_window is {value['sliding_window']!r}, not null")
    if not isinstance(value["centered"], bool) or (value["centered"] and kind != "packed"):
        raise ValueError(f"{where}.centered is {value['centered']!r}")
    dtypes = _tuple(value["dtypes"], f"{where}.dtypes")
    shape = _tuple(value["shape"], f"{where}.shape")
    known = _SLIDING_DTYPES if kind == "sliding" else _DTYPES
    full = {"packed": (1, 4), "sliding": (2, 4)}.get(kind)
    # A layer whose tokens were all removed still has their shape.
    allowed = (full,) if length > 0 else (full, (0, 0))
    if (len(dtypes), len(shape)) not in allowed:
        raise ValueError(
            f"{where} of kind {kind!r} with {length} tokens has dtypes {list(dtypes)} and shape "
            f"{list(shape)}"
        )
    for name in dtypes:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{where}.dtypes has {name!r}, not one of {sorted(known)}")
    for number, size in enumerate(shape):
        # Latents have no values beside them.
        _integer(size, f"{where}.shape", 0 if kind == "packed" and number == 3 else 1)
    if value["centered"] and length == 0:
        raise ValueError(f"{where}.centered is true, of no tokens")
    rank = value["rank"]
    _integer(rank, f"{where}.rank", 0)
    latents = kind == "packed" and len(shape) == 4 and shape[3] == 0
    if (rank > 0) != latents or (latents and rank >= shape[2]):
        raise ValueError(f"{where}.rank is {rank}, of kind {kind!r} with shape {list(shape)}")
    return LayerHeader(
        kind, length, dtypes, shape, value["sliding_window"], value["centered"], rank
    )


def layer_tensors(options: CacheOptions, layer: LayerHeader) -> dict[str, TensorHeader]:
    """Name, dtype and shape of the tensors of a layer.

    Raises:
        ValueError: the options do not fit its head dimensions.
    """
    if not layer.shape:
        return {}
    batch, heads, *dims = layer.shape
    if layer.kind == "sliding":
        window = layer.sliding_window
        assert window is not None  # the header was checked
        tokens = layer.length if window == 1 else min(layer.length, window - 1)
        return {
            name: (dtype, (batch, heads, tokens, dim))
            for name, dtype, dim in zip(("keys", "values"), layer.torch_dtypes, dims, strict=True)
        }
    (dtype,) = layer.torch_dtypes
    layout = options.layout(*dims)
    tensors: dict[str, TensorHeader] = {}
    sides = (("key", layout.key, dims[0]), ("value", layout.value, dims[1]))
    for name, form, dim in sides[: layout.sides]:
        held = packed_tokens(form.axis, layout.window, layer.length)
        tensors[f"{name}_codes"] = torch.uint8, (batch, heads, held, form.code_bytes(dim))
        tensors[f"{name}_params"] = torch.float16, (batch, heads, *form.params_shape(held, dim))
        if layout.window > 0:
            tensors[f"{name}_window"] = dtype, (batch, heads, layout.window, dim)
    if layer.centered:
        tensors["key_mean"] = dtype, (batch, heads, 1, dims[0])
    return tensors


def _exactly(value: Any, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The object, which has these keys and no others."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    if value.keys() != set(names):
        raise ValueError(f"{where} has the fields {sorted(value)}, not {sorted(names)}")
    return value


def _integer(value: Any, where: str, minimum: int) -> None:
    if type(value) is not int or not minimum <= value <= _LARGEST:
        raise ValueError(f"{where} is {value!r}, no integer from {minimum} to {_LARGEST}")


def _tuple(value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is no list")
    return tuple(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a field occurs twice in its header")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its header has the number {name}")
