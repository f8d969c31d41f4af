"""Layers of a PackedCache with random tokens, attention to them, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import transformers
from tokred.cache import CacheOptions, PackedCacheLayer
from tokred.reference.kv_pack import packed_tokens


def options(**changes: Any) -> CacheOptions:
    config = transformers.LlamaConfig(num_hidden_layers=1, head_dim=192)
    return tokred.PackedCache(config, **changes).options


def states(tokens: int, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple:
    draw = generator(seed)
    return tuple(torch.randn(batch, 2, tokens, dim, generator=draw).to(dtype) for dim in (64, 32))


def filled(tokens: int, capacity: int | None = None, **changes: Any) -> PackedCacheLayer:
    layer = PackedCacheLayer(options(**changes), capacity)
    layer.update(*states(tokens))
    return layer


def attended(layer: PackedCacheLayer) -> tuple[Tensor, Tensor]:
    """Attention of one query to everything in the layer."""
    nothing = states(0, batch=layer.contents.batch, dtype=layer.dtype)
    handle, _ = layer.update(*nothing)
    return handle.attend(query(layer.contents.batch), None, True, None)


def assert_same(actual: PackedCacheLayer, expected: PackedCacheLayer) -> None:
    """The same bits for the same tokens."""
    assert actual.length == expected.length
    held = [layer.contents.live(layer.length) for layer in (actual, expected)]
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[1].items():
        if name.endswith("window"):
            side = expected.packed[0 if name.startswith("key") else 1]
            size = tensor.shape[2]
            first = packed_tokens(side.format.axis, size, expected.length)
            rows = torch.arange(first, expected.length) % size
            held[0][name], tensor = held[0][name][:, :, rows], tensor[:, :, rows]
        assert_bitwise_equal(held[0][name], tensor, name)


def query(batch: int = 3) -> Tensor:
    """The same for every row of the batch."""
    return torch.randn(1, 4, 1, 64, generator=generator(9)).expand(batch, -1, -1, -1)
