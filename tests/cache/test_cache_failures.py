"""A call that fails leaves a cache as it was, wherever in it something raises."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokred
from cases.inputs import generator
from cases.tiny_models import transformers
from tokred.cache import PackedCacheLayer

DIM, HEADS, BATCH = 16, 2, 2
FORMS = {
    "4 bits": {"bits": 4, "window": 5},
    "no window": {"bits": 3, "key_axis": "channel", "window": 0},
    "2 bits": {"bits": 2, "group_size": 16, "window": 16},
    "centred late": {"key_bits": 8, "value_bits": 2, "key_axis": "channel", "window": 38},
    "capacity": {"bits": 4, "window": 5, "capacity": 120},
    "dense": {},
}
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 11,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": DIM,
}  # fmt: skip
LLAMA = transformers.LlamaConfig(**SIZES)
GEMMA = transformers.Gemma3TextConfig(
    **SIZES, sliding_window=6, layer_types=["full_attention", "sliding_attention"]
)


class Failure(Exception):
    """What the n-th op raises."""


class FailingOp(TorchDispatchMode):
    """Raises in the place of the n-th op, counted from 0, and lets the others run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise Failure(str(op))
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    return tuple(torch.randn(BATCH, HEADS, tokens, DIM, generator=draw) for _ in range(2))


def filled(config: Any, form: dict, tokens: int, recorded: bool) -> tokred.PackedCache:
    cache = tokred.PackedCache(config, **form) if form else tokred.DenseCache(config)
    if recorded:
        cache.activate_past_recording()
    for start, count in ((0, tokens - tokens // 4), (1, tokens // 4)):
        for layer in range(2):
            if count:
                cache.update(*states(count, 10 * start + layer), layer)
    return cache


def state(cache: tokred.PackedCache) -> list[dict[str, Any]]:
    """Everything that a later call could see."""
    described = []
    for layer in cache.layers:
        held = {"length": layer.get_seq_length(), "initialized": layer.is_initialized}
        if not isinstance(layer, PackedCacheLayer):
            names = ("keys", "values", "cumulative_length", "record_past")
            held |= {name: getattr(layer, name, None) for name in names}
        elif layer.is_initialized:
            held |= layer.contents.live(layer.length)
            for number, each in enumerate(layer.history):
                windows = {f"window {number} {name}": w for name, w in each.windows.items()}
                held |= windows | {f"keys {number}": torch.cat(each.keys, 2)}
                held |= {f"values {number}": torch.cat(each.values, 2), f"at {number}": each.length}
        described.append(held)
    return described


def assert_state(cache: tokred.PackedCache, expected: list[dict[str, Any]], what: str) -> None:
    for actual, held in zip(state(cache), expected, strict=True):
        assert actual.keys() == held.keys(), what
        for name, value in held.items():
            same = torch.equal if isinstance(value, Tensor) else operator.eq
            assert same(actual[name], value), f"{what}: {name}"


def update(tokens: int, layer: int) -> Callable[[tokred.PackedCache], Any]:
    keys, values = states(tokens, 99)
    return lambda cache: cache.update(keys, values, layer)


CALLS: dict[str, Callable[[tokred.PackedCache], Any]] = {
    "update of one": update(1, 0),
    "update of some": update(7, 0),
    "update of many": update(70, 0),
    "update of another dtype": lambda cache: cache.update(
        *(side.bfloat16() if cache.get_seq_length() else side for side in states(3, 98)), 0
    ),
    "update of the last layer": update(7, 1),
    "crop a little": lambda cache: cache.crop(-min(3, cache.get_seq_length())),
    "crop a lot": lambda cache: cache.crop(-min(37, cache.get_seq_length())),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "offload": lambda cache: cache.layers[0].offload(),
    "prefetch": lambda cache: cache.layers[0].prefetch(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "early initialization": lambda cache: cache.early_initialization(
        BATCH, [HEADS] * 2, [DIM] * 2, torch.float32, torch.device("cpu")
    ),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["all packed", "sliding layers"])
def test_reset_leaves_no_token(config: Any) -> None:
    """A cache that was reset goes on as a new one does, sliding layers too."""
    used, fresh = (
        filled(config, FORMS["4 bits"], 39, False),
        tokred.PackedCache(config, bits=4, window=5),
    )
    used.reset()
    assert [layer.get_seq_length() for layer in used.layers] == [0, 0]
    for cache in (used, fresh):
        for layer in range(2):
            cache.update(*states(9, layer), layer)
    assert_state(used, state(fresh), "after reset")


@pytest.mark.parametrize(
    ("form", "config", "recorded"),
    [
        ("4 bits", LLAMA, False),
        ("no window", LLAMA, False),
        ("2 bits", LLAMA, True),
        ("centred late", LLAMA, True),
        ("capacity", LLAMA, False),
        ("dense", LLAMA, False),
        ("4 bits", GEMMA, True),
    ],
    ids=[*FORMS, "sliding layers"],
)
def test_an_op_that_fails_changes_nothing(form: str, config: Any, recorded: bool) -> None:
    """Every op of every call, on caches of several lengths."""
    failed = set()
    for tokens in (0, 39):
        base = filled(config, FORMS[form], tokens, recorded)
        before = copy.deepcopy(state(base))
        for name, call in CALLS.items():
            if tokens == 0 and not name.startswith(("update", "early")):
                continue
            if config is GEMMA and name.startswith("crop") and not recorded:
                continue  # transformers' sliding layer refuses
            cache = copy.deepcopy(base)
            for number in range(200):
                try:
                    with torch.no_grad(), FailingOp(number):
                        call(cache)
                except Failure:
                    failed.add(name)
                    assert_state(cache, before, f"{name} of {tokens} tokens, op {number}")
                    continue
                break
            else:
                pytest.fail(f"{name} has no end of ops")
    assert len(failed) >= 10


@pytest.mark.parametrize("form", FORMS)
def test_a_failed_call_can_be_repeated(form: str) -> None:
    for tokens in (0, 39):
        base = filled(LLAMA, FORMS[form], tokens, False)
        expected, cache = copy.deepcopy(base), copy.deepcopy(base)
        update(7, 0)(expected)
        for number in range(200):
            try:
                with FailingOp(number):
                    update(7, 0)(cache)
            except Failure:
                continue
            break
        assert number >= (2 if form == "dense" else 5)
        assert_state(cache, state(expected), "repeated")


def test_a_crop_that_one_layer_refuses_changes_no_other() -> None:
    """transformers' sliding layer gives no token back unless it was told to record."""
    cache = filled(GEMMA, FORMS["4 bits"], 20, False)
    before = copy.deepcopy(state(cache))
    with pytest.raises(RuntimeError, match="sliding window"):
        cache.crop(-2)
    assert_state(cache, before, "crop")


def test_an_update_that_a_sliding_layer_refuses() -> None:
    cache = filled(GEMMA, FORMS["4 bits"], 20, False)
    before = copy.deepcopy(state(cache))
    keys, values = states(2, 0)
    with pytest.raises(RuntimeError):
        cache.update(keys, values[:1], 1)
    assert_state(cache, before, "update")


def test_tokens_in_the_memory_of_the_cache_are_refused() -> None:
    cache = filled(LLAMA, FORMS["4 bits"], 39, False)
    before = copy.deepcopy(state(cache))
    keys, values = states(3, 0)
    window = cache.layers[0].windows["value"]
    for name, sides in (("keys", (window[:, :, :3], values)), ("values", (keys, window[:, :, :3]))):
        with pytest.raises(ValueError, match=f"{name} lie in the memory of the cache"):
            cache.update(*sides, 0)
    assert_state(cache, before, "update")


@pytest.mark.parametrize("make", [tokred.PackedCache, tokred.DenseCache])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_a_forward_pass_that_ended_between_two_layers(make: Any, config: Any) -> None:
    """Its tokens are in the first layer alone: the next pass is told so, not given other text."""
    cache = make(config)
    keys = torch.randn(BATCH, HEADS, 3, DIM, generator=generator())
    cache.update(keys, keys, 0)
    cache.update(keys[:, :, :1].clone(), keys[:, :, :1].clone(), 0)
    with pytest.raises(ValueError, match=r"layer 1 .* is empty, and layer 0 held 3 tokens.*reset"):
        cache.update(keys[:, :, :1].clone(), keys[:, :, :1].clone(), 1)
    cache.reset()
    for number in (0, 1, 0, 1):
        cache.update(keys, keys, number)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6]
