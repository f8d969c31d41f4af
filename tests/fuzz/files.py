"""Mutated cache files: a ValueError names the file, or the cache that comes out works.

Bytes are changed anywhere, and files are forged whose checksum is that of their contents.
"""

from __future__ import annotations

import copy
import json
import resource
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from compare import Mismatch
from draw import Draw
from histories import config
from torch import Tensor

import tokred
from tokred.cache import PackedCacheLayer, files

HEAD_DIM, HEADS, BATCH = 16, 2, 2
MAX_ROOM = 1 << 20  # tokens
MAX_GROWTH = 64 << 20  # bytes that a small file may make the process take
_FORMS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "window": 5},
    {"bits": 3, "key_axis": "channel", "window": 0, "rotate": False},
    {"bits": 2, "group_size": 16, "window": 16, "capacity": 64},
    {"key_bits": 8, "value_bits": 2, "key_axis": "channel", "window": 5},
    {"bits": 8, "scheme": "fp8", "window": 4},
    {"bits": 3, "scheme": "codebook", "window": 4},
)
_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 4.0, 0.5, 1e300, float("nan"), float("inf"), 16, 17,
    32, 39, 40, 41, 64, 100, 10**6, 10**9, 2**31 - 1, 2**31, 2**33, 2**53, 2**63 - 1, 2**63, 2**70,
    -(2**31), -(2**63), 10**30, "", "x", "float32", "float64", "float16", "int8", "nn", "load",
    "Tensor", "__class__", "token", "channel", "asymmetric", "fp8", "codebook", "DynamicLayer",
    "packed", "DynamicSlidingWindowLayer", "../../x", "\0", [], {}, [[]], {"a": 1}, [1, 2, 3, 4],
    [2, 2, 16, 16], [0, 2, 16, 16], [2, 0, 16, 16], [2**40, 2, 16, 16], [-1, 2, 16, 16],
)  # fmt: skip
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def _configs() -> dict[str, Any]:
    sliding = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_DIM, vocab_size=11, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return {"full": config(HEAD_DIM, HEADS), "sliding": sliding}


CONFIGS = _configs()


@cache
def _originals() -> list[tuple[str, bytes]]:
    """The files that are mutated, with the model each is of."""
    made = []
    generator = torch.Generator().manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        for model, configuration in CONFIGS.items():
            for form in _FORMS:
                for tokens in (0, 3, 40):
                    saved = tokred.PackedCache(configuration, **form)
                    for number in range(2 if tokens else 0):
                        shape = (BATCH, HEADS, tokens, HEAD_DIM)
                        sides = [torch.randn(shape, generator=generator) for _ in range(2)]
                        saved.update(*sides, number)
                    saved.save(path)
                    made.append((model, path.read_bytes()))
    return made


# A safetensors file: the size of the header, the header in JSON, the data.
def _split(file: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def _join(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _tensors(header: dict[str, Any], data: bytes) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = torch.tensor(list(data[first:last]), dtype=torch.uint8)
            tensors[name] = flat.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    header, data = {"__metadata__": metadata}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        offsets = [len(data), len(data) + len(raw)]
        shape = list(tensor.shape)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        data += raw
    return _join(json.dumps(header).encode(), data)


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every part of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from _paths(part, (*path, key))


def _odd_json(draw: Draw, value: Any) -> Any:
    """The value with one to three parts changed, removed or added."""
    for _ in range(draw.one_of(1, 1, 1, 2, 3)):
        path = draw.choice(list(_paths(value)))
        odd = copy.deepcopy(draw.choice(_ODD))
        if not path:
            value = odd if draw.chance(0.1) else value
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw.choice(["change", "change", "step", "remove", "add"])
        old = parent[path[-1]]
        if kind == "step" and type(old) is int:
            parent[path[-1]] = old + draw.one_of(-1, 1, 2, 16, -16)
        elif kind == "remove":
            del parent[path[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw.choice(["extra", "0.records", "kind", "length", "dtype", "shape"])] = odd
        else:
            parent[path[-1]] = odd
    return value


def _odd_tensor(draw: Draw, tensor: Tensor) -> Tensor:
    ways = [
        lambda t: t[..., :-1],
        lambda t: t[:1],
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], min(2, t.dim() - 1)),
        lambda t: t.to(draw.choice([torch.float16, torch.float64, torch.int64, torch.bool])),
        lambda t: t[:, :, :0],
        lambda t: t.flatten(),
        lambda t: t.flatten()[:0],
        lambda t: torch.zeros((), dtype=t.dtype),
        lambda t: t[..., None],
        lambda t: torch.zeros(0, 2, 2**20, 3, dtype=t.dtype),
        lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype),
    ]
    return draw.choice(ways)(tensor).contiguous() if tensor.dim() else tensor


def _forged(draw: Draw, file: bytes) -> bytes:
    """A file with another description or other tensors, and the checksum of that."""
    header, data = _split(file)
    tensors, metadata = _tensors(header, data), dict(header["__metadata__"])
    content = json.loads(metadata["content"])
    what = draw.choice(["content", "content", "content", "tensors", "both", "no items"])
    if what in ("content", "both"):
        content = _odd_json(draw, content)
    if what in ("tensors", "both") and tensors:
        name = draw.choice(list(tensors))
        tensors[name] = _odd_tensor(draw, tensors[name])
        if draw.chance(0.3):
            del tensors[draw.choice(list(tensors))]
        if draw.chance(0.3):
            extra = draw.choice(["../../x", "0.x", "7.records", "records", "", "0.keys", "1.", "é"])
            tensors[extra] = torch.zeros(draw.choice([(0,), (3,), (1, 2, 3, 16), ()]))
    if what == "no items":
        _empty(draw, content, tensors)
    text = json.dumps(content)
    if draw.chance(0.04):
        depth = draw.one_of(500, 5000, 100_000)
        text = "[" * depth + "]" * depth
    elif draw.chance(0.05):
        text = text[: draw.randrange(len(text) + 1)]
    elif draw.chance(0.04):
        text = text.replace('"length"', '"length": 1, "length"', 1)
    metadata |= {"content": text, "checksum": files._checksum(text, tensors)}
    return _file(tensors, metadata)


def _empty(draw: Draw, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A batch of 0 with any number of tokens: tensors of no bytes, and buffers of any size."""
    for number, layer in enumerate(content["layers"]):
        if not layer.get("shape"):
            continue
        length = draw.choice([0, 5, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**64, -1])
        layer["shape"][0], layer["length"] = 0, length
        for name in [name for name in tensors if name.startswith(f"{number}.")]:
            shape = list(tensors[name].shape)
            shape[0] = 0
            if "window" not in name:
                shape[2] = min(max(length, 0), 2**30)
            tensors[name] = torch.empty(shape, dtype=tensors[name].dtype)


def _mutated(draw: Draw, file: bytes) -> tuple[str, bytes]:
    ways = {"forged": 40, "header": 8, "flipped": 6, "header bytes": 5, "cut": 3, "size": 3,
            "inserted": 2, "deleted": 2, "zeroed": 2, "appended": 1}  # fmt: skip
    way = draw.choices(list(ways), list(ways.values()))[0]
    if way == "forged":
        return way, _forged(draw, file)
    at, count = draw.randrange(len(file)), draw.one_of(1, 8, 100)
    if way == "cut":
        return way, file[:at]
    if way == "inserted":
        return way, file[:at] + draw.randbytes(count) + file[at:]
    if way == "deleted":
        return way, file[:at] + file[at + count :]
    if way == "zeroed":
        return way, file[:at] + bytes(len(file[at : at + count])) + file[at + count :]
    if way == "appended":
        return way, file + draw.randbytes(count)
    if way == "flipped":
        changed = bytearray(file)
        for _ in range(draw.one_of(1, 1, 2, 8)):
            changed[draw.randrange(len(file))] ^= 1 << draw.randrange(8)
        return way, bytes(changed)
    if way == "size":
        sizes = [0, 1, 7, 2**63, 2**64 - 1, 2**32, len(file), len(file) - 8, 100_000_000, at]
        return way, struct.pack("<Q", draw.choice(sizes)) + file[8:]
    header, data = _split(file)
    if way == "header":
        return way, _join(json.dumps(_odd_json(draw, header)).encode(), data)
    text = bytearray(json.dumps(header).encode())
    odd = [b"9", b"-", b"1e9", b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"\xff"]
    for _ in range(draw.one_of(1, 2, 4)):
        start = draw.randrange(len(text))
        text[start : start + draw.one_of(0, 1, 3)] = draw.choice([*odd, b"9" * 20, b"\\u0000"])
    return way, _join(bytes(text), data)


def _use(loaded: Any) -> None:
    """A cache that was loaded takes tokens and is attended to."""
    for layer in loaded.layers:
        if not isinstance(layer, PackedCacheLayer):
            count = layer.get_seq_length()
            if type(count) is not int or not 0 <= count < 2**40:
                raise Mismatch(f"a sliding layer of length {count!r}")
            layer.get_mask_sizes(1)
            continue
        packed = layer.packed if layer.is_initialized else None
        batch, heads = packed[0].codes.shape[:2] if packed else (BATCH, HEADS)
        dims = [side.head_dim for side in packed] if packed else [HEAD_DIM] * 2
        dtype = layer.dtype if packed else torch.float32
        if layer.capacity is not None and layer.length + 2 > layer.capacity:
            continue
        if max(layer.capacity or 0, layer.options.window) > MAX_ROOM:
            continue  # it may be asked for, and there may be no memory for it
        sides = [torch.ones(batch, heads, 2, dim, dtype=dtype) for dim in dims]
        layer.update(*sides)
        windows = layer.windows.get("key"), layer.windows.get("value")
        q = torch.ones(batch, 2 * heads, 1, dims[0], dtype=dtype)
        tokred.packed_attention(q, *layer.packed, *windows, length=layer.length)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def examine(name: str, seed: int) -> None:
    """One mutated file.

    Raises:
        Mismatch: another error than a ValueError with the path, too much memory, or a cache that
            was loaded and does not work.
    """
    draw = Draw(name, seed)
    model, original = draw.choice(_originals())
    way, file = _mutated(draw, original)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        path.write_bytes(file)
        before = _peak()
        try:
            loaded = tokred.PackedCache.load(path, CONFIGS[model])
        except ValueError as error:
            if str(path) not in str(error):
                raise Mismatch(f"{way}: the error does not name the file: {error}") from error
            loaded = None
        except Exception as error:
            raise Mismatch(f"{way}: {type(error).__name__}: {str(error)[:300]}") from error
        if _peak() - before > MAX_GROWTH:
            raise Mismatch(f"{way}: {_peak() - before} bytes for a file of {len(file)}")
        if loaded is not None:
            try:
                _use(loaded)
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error)[:300]}"
                raise Mismatch(f"{way}: loaded, and does not work: {problem}") from error
