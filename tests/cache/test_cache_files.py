"""Packed caches in files: an exact round trip, and what is said of files that do not fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import tokred
from cases.compare import assert_bitwise_equal
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.cache import PackedCacheLayer
from tokred.cache.files import safe_open, save_file
from tokred.compat import cache_keyword
from tokred.integrations.transformers import attention

SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": lambda: tiny_lm("Llama", head_dim=16),
    "gemma3": lambda: tiny_lm("Gemma3Text", head_dim=16, query_pre_attn_scalar=16, **SLIDING),
}
FORMATS = {
    "4 bits": {"bits": 4, "window": 5},
    "no window": {"bits": 3, "key_axis": "channel", "window": 0, "rotate": False},
    "2 bits": {"bits": 2, "group_size": 16, "window": 16, "capacity": 64},
    "8 and 2 bits": {"key_bits": 8, "value_bits": 2, "key_axis": "channel", "window": 5},
}


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = MODELS[request.param]()
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    return model


def filled(model: nn.Module, tokens: int = 40, **options: Any) -> tokred.PackedCache:
    cache = tokred.PackedCache(model.config, **options)
    ids, mask = left_padded(2, tokens)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], **{cache_keyword(): cache})
        model(ids[:, -1:], attention_mask=mask, **{cache_keyword(): cache})
    return cache


@pytest.mark.parametrize("name", FORMATS)
def test_the_round_trip_is_exact(model: nn.Module, name: str, tmp_path: Path) -> None:
    saved = filled(model, **FORMATS[name])
    path = tmp_path / "cache.safetensors"
    saved.save(path)
    loaded = tokred.PackedCache.load(path, model.config)
    assert loaded.options == saved.options and loaded.capacity == saved.capacity
    for ours, theirs in zip(loaded.layers, saved.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length() == 40
        if isinstance(ours, PackedCacheLayer):
            assert ours.dtype == theirs.dtype
            held = [layer.contents.live(40) for layer in (ours, theirs)]
            assert held[0].keys() == held[1].keys()
            assert ("key_mean" in held[0]) == ours.options.center
            for key, tensor in held[1].items():
                assert_bitwise_equal(held[0][key], tensor, f"{name} {key}")
        else:
            assert_bitwise_equal((ours.keys, ours.values), (theirs.keys, theirs.values))
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    with safe_open(path, "pt") as first, safe_open(again, "pt") as second:
        assert first.metadata() == second.metadata()
    ids, mask = left_padded(2, 41)
    results = [
        generated(model, ids, mask, max_new_tokens=20, **{cache_keyword(): cache})
        for cache in (saved, loaded)
    ]
    assert torch.equal(*results)
    assert saved.nbytes(1).codes == loaded.nbytes(1).codes > 0


def test_a_cache_without_tokens(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    tokred.PackedCache(model.config).save(path)
    loaded = tokred.PackedCache.load(str(path), model.config)
    assert loaded.get_seq_length() == 0 and loaded.nbytes().codes == 0
    ids, mask = left_padded()
    expected = generated(model, ids, mask, **{cache_keyword(): tokred.PackedCache(model.config)})
    assert torch.equal(generated(model, ids, mask, **{cache_keyword(): loaded}), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_the_shape_of_removed_tokens_is_remembered(
    model: nn.Module, name: str, tmp_path: Path
) -> None:
    """Tokens that an emptied cache refuses, it still refuses when it was saved and loaded."""
    path = tmp_path / "cache.safetensors"
    emptied = filled(model, 5, **FORMATS[name])
    emptied.crop(-5)
    emptied.save(path)
    loaded = tokred.PackedCache.load(path, model.config)
    assert loaded.get_seq_length() == 0 and loaded.nbytes().codes == 0
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    with safe_open(path, "pt") as first, safe_open(again, "pt") as second:
        assert first.metadata() == second.metadata()
    for batch, heads in ((3, 3), (2, 1)):
        token = torch.ones(batch, heads, 1, 16)
        for layer in range(len(loaded.layers)):
            for cache in (emptied, loaded):
                with pytest.raises((ValueError, RuntimeError)):
                    cache.update(token, token.clone(), layer)
    ids, mask = left_padded()
    expected = generated(model, ids, mask, **{cache_keyword(): emptied})
    assert torch.equal(generated(model, ids, mask, **{cache_keyword(): loaded}), expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cache.safetensors"
    filled(llama()).save(path)
    return path


def llama(**options: Any) -> nn.Module:
    model = tiny_lm("Llama", **{"head_dim": 16, **options})
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    return model


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_a_truncated_file(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cache.safetensors is damaged"):
        tokred.PackedCache.load(path, llama().config)


@pytest.mark.parametrize("place", [0.0, 0.5, 0.9, 0.999])
def test_a_damaged_file(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cache.safetensors is damaged"):
        tokred.PackedCache.load(path, llama().config)


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """The file with other tensors or another header."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata["content"])
    change(tensors, header)
    metadata["content"] = json.dumps(header)
    save_file(tensors, path, metadata)


def without_tensor(tensors: dict, header: dict) -> None:
    del tensors["1.key_codes"]


def shorter_tensor(tensors: dict, header: dict) -> None:
    tensors["1.value_params"] = tensors["1.value_params"][:, :, :-1].contiguous()


def other_length(tensors: dict, header: dict) -> None:
    header["layers"][0]["length"] = 2**40


@pytest.mark.parametrize("change", [without_tensor, shorter_tensor, other_length])
def test_a_changed_file(path: Path, change: Callable[[dict, dict], None]) -> None:
    rewritten(path, change)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        tokred.PackedCache.load(path, llama().config)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("format", "pt", r"is no file of a tokred.PackedCache"),
    ("version", "2", r"has version 2, this reads 3"),
])  # fmt: skip
def test_another_format(path: Path, key: str, value: str, message: str) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, {**file.metadata(), key: value})
    with pytest.raises(ValueError, match=message):
        tokred.PackedCache.load(path, llama().config)


def test_another_model(path: Path) -> None:
    for options, message in (
        ({"num_hidden_layers": 3}, "has 2 layers, the model has 3"),
        ({"num_key_value_heads": 9}, r"layer 0 of .* num_key_value_heads 3, the model's has 9"),
        ({"head_dim": 32}, "has head_dim 16, the model's has 32"),
    ):
        with pytest.raises(ValueError, match=message):
            tokred.PackedCache.load(path, llama(**options).config)
    with pytest.raises(ValueError, match="kind packed, the model's has sliding"):
        tokred.PackedCache.load(path, MODELS["gemma3"]().config)


def test_latents_of_another_model(tmp_path: Path) -> None:
    """Rows of as many channels, split at another one or not at all."""
    path = tmp_path / "cache.safetensors"
    sizes = {"kv_lora_rank": 32, "qk_rope_head_dim": 16}
    config = transformers.DeepseekV3Config(num_hidden_layers=2, **sizes)
    cache = tokred.PackedCache(config)
    for number in range(2):
        cache.update(torch.randn(1, 1, 3, 32), torch.randn(1, 1, 3, 16), number)
    cache.save(path)
    assert tokred.PackedCache.load(path, config).get_seq_length() == 3
    other = transformers.DeepseekV3Config(num_hidden_layers=2, kv_lora_rank=16, qk_rope_head_dim=32)
    with pytest.raises(ValueError, match="has channels of latents 32, the model's has 16"):
        tokred.PackedCache.load(path, other)
    heads = {"hidden_size": 48, "num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(ValueError, match="has channels of latents 32, the model's has 0"):
        tokred.PackedCache.load(
            path, transformers.LlamaConfig(num_hidden_layers=2, head_dim=48, **heads)
        )


def test_another_sliding_window(tmp_path: Path) -> None:
    model = MODELS["gemma3"]()
    attention.register()
    model.set_attn_implementation("tokred")
    path = tmp_path / "cache.safetensors"
    filled(model).save(path)
    model.config.sliding_window = 7
    with pytest.raises(ValueError, match="has sliding_window 6, the model's has 7"):
        tokred.PackedCache.load(path, model.config)


def test_other_files(tmp_path: Path) -> None:
    config = llama().config
    with pytest.raises(FileNotFoundError):
        tokred.PackedCache.load(tmp_path / "nothing", config)
    text = tmp_path / "text"
    text.write_text("surely no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        tokred.PackedCache.load(text, config)
    other = tmp_path / "other"
    save_file({"0.records": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="no file of a"):
        tokred.PackedCache.load(other, config)


def test_layers_that_cannot_be_saved(tmp_path: Path) -> None:
    cache = tokred.PackedCache(llama().config)
    cache.layers[1] = transformers.cache_utils.DynamicLayer()
    cache.layers[1].update(torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    with pytest.raises(ValueError, match="class DynamicLayer cannot be saved"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


# Files whose checksum is right are not trusted either.

NASTY = (
    None, True, -1, 0, 1, 3, 41, 4.0, float("nan"), 2**31, 2**62, 10**30, "", "load", "float64",
    "token", "packed", "none", [], {}, [2, 3, 16, 16], [2**40, 3, 16, 16], [0, 3, 16, 16],
    ["uint8"],
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all fields and elements."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in items:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def changed(header: dict, place: tuple, value: Any) -> dict:
    header = copy.deepcopy(header)
    *outer, last = place
    part: Any = header
    for key in outer:
        part = part[key]
    if value is places:
        del part[last]
    else:
        part[last] = value
    return header


def write(path: Path, tensors: dict, metadata: dict, content: str) -> None:
    checksum = tokred.cache.files._checksum(content, tensors)
    save_file(tensors, path, {**metadata, "content": content, "checksum": checksum})


def used(cache: tokred.PackedCache) -> None:
    """A token more."""
    for number, layer in enumerate(cache.layers):
        packed = isinstance(layer, PackedCacheLayer)
        batch, heads = 2, 3
        if packed and layer.is_initialized:
            batch, heads = layer.contents.batch, layer.contents.heads
        token = torch.randn(batch, heads, 1, 16)
        cache.update(token, token.clone(), number)


@pytest.mark.parametrize("family", MODELS)
def test_headers_that_were_changed(family: str, tmp_path: Path) -> None:
    """Every field gone, doubled or of every odd value: refused with the path, or of use."""
    model = MODELS[family]()
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    path = tmp_path / "cache.safetensors"
    filled(model, 20, window=5).save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata["content"])
    refused = 0
    contents = [
        json.dumps(changed(header, place, value))
        for place in places(header)
        for value in (*NASTY, places)
    ]
    contents += ["[" * 100_000 + "]" * 100_000, "", "null", "[]", '{"options": 1}', "9" * 10_000]
    contents.append(metadata["content"].replace('"length"', '"length": 1, "length"', 1))
    contents.append(metadata["content"].replace('"capacity"', '"extra": 1, "capacity"', 1))
    for content in contents:
        write(path, tensors, metadata, content)
        try:
            cache = tokred.PackedCache.load(path, model.config)
        except ValueError as error:
            assert str(path) in str(error), content
            refused += 1
        else:
            used(cache)
    assert refused > 0.9 * len(contents)


def test_tensors_that_were_changed(tmp_path: Path) -> None:
    model, path = MODELS["gemma3"](), tmp_path / "cache.safetensors"
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    filled(model, 20, window=5).save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    for name, tensor in tensors.items():
        for other in (
            tensor[:1], tensor[..., :-1], tensor[:, :, :0], tensor.reshape(-1), tensor.sum(),
            tensor.repeat(1, 1, 2, 1), tensor.to(torch.int64), tensor[:0], None,
        ):  # fmt: skip
            parts = {k: v for k, v in tensors.items() if k != name}
            if other is not None:
                parts[name] = other.contiguous()
            write(path, parts, metadata, metadata["content"])
            with pytest.raises(ValueError, match=r"cache.safetensors is damaged: "):
                tokred.PackedCache.load(path, model.config)
    write(path, {**tensors, "7.keys": tensors["0.keys"].clone()}, metadata, metadata["content"])
    with pytest.raises(ValueError, match=r"has \['7.keys'\] beside"):
        tokred.PackedCache.load(path, model.config)


def test_a_loaded_cache_owns_its_tensors(tmp_path: Path) -> None:
    """The file may be written again while the cache is in use."""
    model, path = MODELS["gemma3"](), tmp_path / "cache.safetensors"
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    filled(model).save(path)
    loaded = tokred.PackedCache.load(path, model.config)
    before = [
        {name: tensor.clone() for name, tensor in tensors(layer).items()} for layer in loaded.layers
    ]
    path.write_bytes(b"\0" * path.stat().st_size)
    for layer, held in zip(loaded.layers, before, strict=True):
        for name, tensor in tensors(layer).items():
            assert_bitwise_equal(tensor, held[name], name)


def tensors(layer: Any) -> dict[str, torch.Tensor]:
    if isinstance(layer, PackedCacheLayer):
        return layer.contents.tensors()
    return {"keys": layer.keys, "values": layer.values}


def test_a_capacity_is_a_limit_and_no_allocation(tmp_path: Path) -> None:
    model, path = MODELS["llama"](), tmp_path / "cache.safetensors"
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    filled(model, window=5, capacity=64).save(path)
    with safe_open(path, "pt") as file:
        parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    content = metadata["content"].replace('"capacity": 64', f'"capacity": {2**31 - 1}')
    write(path, parts, metadata, content)
    loaded = tokred.PackedCache.load(path, model.config)
    used(loaded)
    assert loaded.nbytes().total < 10 * path.stat().st_size


def test_a_file_stays_where_saving_fails(tmp_path: Path) -> None:
    model, path = MODELS["llama"](), tmp_path / "cache.safetensors"
    model.set_attn_implementation(tokred.integrations.transformers.attention.register())
    filled(model).save(path)
    before = path.read_bytes()
    full = mock.patch("tokred.cache.files.save_file", side_effect=OSError("no space left"))
    with full, pytest.raises(OSError, match="no space left"):
        filled(model).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
