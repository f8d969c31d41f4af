"""Tokens that a PackedCache takes back leave no trace, and its copies go ways of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokred
from cases.cache_layers import assert_same, attended, filled, options, query, states
from cases.tiny_models import generated, tiny_lm, transformers
from tokred import compat
from tokred.cache import PackedCacheLayer
from tokred.cache.rollback import ROLLBACK
from tokred.integrations.transformers import attention

FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"window": 5}, {"window": 0}, {"bits": 2}, {"key_axis": "token", "window": 32}],
    ids=str,
)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


def parts(layer: PackedCacheLayer, first: int, *counts: int) -> None:
    """So many tokens at a time, those of states(300) from the first on."""
    for count in counts:
        layer.update(*(side[:, :, first : first + count].clone() for side in states(300)))
        first += count


@FORMS
@pytest.mark.parametrize("before", [3, 30, 64, 100])
def test_the_last_update_leaves_no_trace(form: dict, before: int) -> None:
    for more, removed in ((2, 1), (2, 2), (40, 7), (ROLLBACK, ROLLBACK)):
        layer, expected = (PackedCacheLayer(options(**form)) for _ in range(2))
        parts(layer, 0, before, more)
        layer.crop(-removed)
        parts(expected, 0, before)
        if more > removed:
            parts(expected, before, more - removed)
        assert_same(layer, expected)
        for each in (layer, expected):
            parts(each, before + more - removed, 1, 40)
        assert_same(layer, expected)


@FORMS
def test_recorded_updates_leave_no_trace(form: dict) -> None:
    """As assisted generation has them: drafts token by token, and what is accepted of them."""
    layer, expected = (PackedCacheLayer(options(**form)) for _ in range(2))
    layer.activate_past_recording()
    parts(layer, 0, 40)
    parts(expected, 0, 40)
    length = 40
    for drafted, removed in ((5, 3), (1, 0), (20, 20), (12, 1), (9, 9), (3, 2), (60, 31)):
        parts(layer, length, *(1 for _ in range(drafted)))
        layer.crop(-removed)
        parts(expected, length, *(1 for _ in range(drafted - removed)))
        length += drafted - removed
        assert_same(layer, expected)
    layer.crop(-1)
    expected_length = layer.length
    parts(layer, expected_length, 1)
    assert_same(layer, expected)
    assert len(layer.history) <= 2


def test_what_is_not_recorded_comes_back_from_its_codes() -> None:
    layer, exact = (PackedCacheLayer(options(window=8)) for _ in range(2))
    parts(layer, 0, 75, 1)
    parts(exact, 0, 70)
    layer.crop(-6)
    assert layer.length == exact.length
    error = (attended(layer)[0] - attended(exact)[0]).abs().max()
    assert 0 < error < 0.2


def test_assisted_generation_with_the_default_window() -> None:
    model = tiny_lm("Llama", head_dim=16)
    model.set_attn_implementation(attention.register())
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(5)).repeat(1, 6)
    keyword = compat.cache_keyword()
    for form in ({"bits": 8}, {"bits": 2}):
        results = []
        for assisted in ({}, {"prompt_lookup_num_tokens": 3}):
            cache = tokred.PackedCache(model.config, **form)
            assert cache.is_croppable
            arguments = {"max_new_tokens": 40, keyword: cache, **assisted}
            results.append(generated(model, ids, None, **arguments))
        if form["bits"] == 8:
            assert torch.equal(*results)
        assert results[0].shape == results[1].shape


STAGES: dict[str, Callable[[PackedCacheLayer], Any]] = {
    "empty": lambda layer: None,
    "in the window": lambda layer: parts(layer, 0, 5),
    "packed": lambda layer: parts(layer, 0, 75, 1),
    "to be taken back": lambda layer: parts(layer, 0, 75, 6),
    "cropped": lambda layer: (parts(layer, 0, 75), layer.crop(-30)),
}


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved])
def test_a_copy_goes_its_own_way(stage: str, copied: Callable) -> None:
    config = transformers.Gemma3TextConfig(
        hidden_size=64, num_hidden_layers=2, head_dim=64, sliding_window=6,
        num_attention_heads=2, num_key_value_heads=2,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    for form in ({}, {"bits": 2}, {"capacity": 150}):
        cache = tokred.PackedCache(config, **form)
        STAGES[stage](cache.layers[0])
        cache.layers[1].update(*(side[..., :32] for side in states(9)))
        expected = copy.deepcopy(cache)
        others = [copied(cache), copied(cache)]
        lone = copied(cache.layers[0])
        for number, other in enumerate(others):
            for _ in range(40):
                other.update(*states(1, seed=number), 0)
            other.update(*(side[..., :32] for side in states(1, seed=number)), 1)
        parts(lone, 100, 1, 1, 40)
        if stage != "empty":
            assert_same(cache.layers[0], expected.layers[0])
            for number, other in enumerate(others):
                whole = copy.deepcopy(expected)
                for _ in range(40):
                    whole.update(*states(1, seed=number), 0)
                assert_same(other.layers[0], whole.layers[0])
            assert torch.equal(*(attended(each.layers[0])[0] for each in (cache, expected)))
        assert cache.layers[1].get_seq_length() == 9 and others[0].layers[1].get_seq_length() == 10
        assert torch.equal(cache.layers[1].keys, expected.layers[1].keys)


def test_batches_are_rolled_back_row_by_row() -> None:
    layer = filled(40, window=5)
    parts(layer, 40, 6)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.crop(-4)
    expected = filled(40, window=5)
    parts(expected, 40, 2)
    expected.reorder_cache(torch.tensor([2, 0, 0]))
    assert_same(layer, expected)


# What keys lack of their mean.


@pytest.mark.parametrize("reduce", ["none", "group_mean", "group_max", "head_mean", "softmax_vote"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_have_the_mean(reduce: str, dtype: torch.dtype) -> None:
    bias = 20 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(3))
    layer = PackedCacheLayer(options(bits=8, window=5))
    keys, values = states(60)
    layer.update((keys + bias).to(dtype), values.to(dtype))
    assert (layer.key_mean.float() - bias).abs().max() < 1
    handle, _ = layer.update(*(side[:, :, :0].to(dtype) for side in (keys, values)))
    q = query().repeat(1, 1, 2, 1).to(dtype)
    expected = tokred.qk_score(q.mean(2), (keys + bias).to(dtype), reduce)
    actual = handle.score(q, reduce, None, None)
    tolerance = 0.05 if dtype == torch.float32 else 1.5
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=tolerance)


@pytest.mark.parametrize("count", [1, 5])
def test_attention_has_the_mean(count: int) -> None:
    """Also in lse, by which sinks and new tokens are combined."""
    bias = 20 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(3))
    keys, values = states(60)
    layer = PackedCacheLayer(options(bits=8, window=5))
    layer.update((keys + bias)[:, :, : 60 - count], values[:, :, : 60 - count])
    handle, _ = layer.update((keys + bias)[:, :, 60 - count :], values[:, :, 60 - count :])
    q = query().repeat(1, 1, count, 1)
    actual = handle.attend(q, 0.05, count > 1, None)
    expected = tokred.biased_attention(q, keys + bias, values, causal=count > 1, scale=0.05)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_a_key_that_is_not_finite_spoils_no_other() -> None:
    keys, values = states(60)
    keys[0, 0, 3] = torch.inf
    layer = PackedCacheLayer(options(window=5))
    layer.update(keys, values)
    assert layer.key_mean.isfinite().all() and attended(layer)[0][1:].isfinite().all()


def test_autocast_and_other_dtypes() -> None:
    """Half precision goes into a cache of float32, and float32 makes one of the other."""
    keys, values = states(60)
    expected: Tensor | None = None
    for first, then in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        layer = PackedCacheLayer(options(bits=8, window=5))
        layer.update(keys[:, :, :50].to(first), values[:, :, :50].to(torch.bfloat16))
        layer.update(keys[:, :, 50:].to(then), values[:, :, 50:].to(torch.bfloat16))
        assert layer.dtype == torch.float32
        out = attended(layer)[0]
        expected = tokred.biased_attention(query(), keys, values)[0]
        torch.testing.assert_close(out, expected, rtol=0.1, atol=0.05)


def test_a_compiled_step_past_the_window() -> None:
    layer = filled(30, window=32)
    expected = filled(30, window=32)

    def step(held: PackedCacheLayer, keys: Tensor, values: Tensor) -> Tensor:
        handle, _ = held.update(keys, values)
        return handle.attend(query(), None, False, None)[0]

    compiled = torch.compile(step, backend="aot_eager")
    with torch.no_grad():
        for number in range(4):
            tokens = states(1, seed=number)
            torch.testing.assert_close(compiled(layer, *tokens), step(expected, *tokens))
    assert layer.packed[0].num_tokens > 0 and layer.key_mean is not None
    assert_same(layer, expected)
