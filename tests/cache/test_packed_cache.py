"""PackedCache in transformers' models, against the same quantisation in plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

import tokred
from cases.cache_oracle import Transcribed
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.compat import cache_keyword
from tokred.integrations.transformers import attention

SLIDING = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": lambda: tiny_lm("Llama", head_dim=16),
    "qwen3": lambda: tiny_lm("Qwen3", head_dim=32),
    "mistral": lambda: tiny_lm("Mistral", head_dim=16, sliding_window=None),
    "gemma3": lambda: tiny_lm(
        "Gemma3Text", head_dim=48, sliding_window=6, layer_types=SLIDING,
        query_pre_attn_scalar=48,
    ),
    "gpt-oss": lambda: tiny_lm(
        "GptOss", head_dim=16, sliding_window=6, num_local_experts=4, num_experts_per_tok=2,
        layer_types=SLIDING,
    ),
}  # fmt: skip
CHANNEL = {"key_axis": "channel", "window": 5}
TOKEN = {"key_axis": "token", "group_size": 16, "window": 16}
FORMATS = {
    "4 bits": {"bits": 4, **CHANNEL},
    "4 bits, centred": {"bits": 4, "key_axis": "channel", "window": 17},
    "4 bits, no window": {"bits": 4, "key_axis": "channel", "window": 0},
    "2 bits": {"bits": 2, **TOKEN},
    "3 bits, not rotated": {"bits": 3, **TOKEN, "rotate": False},
    "8 and 2 bits": {"key_bits": 8, "value_bits": 2, **CHANNEL, "scheme": "zero_point"},
    "fp8": {"bits": 8, **CHANNEL, "scheme": "fp8"},
    "codebook": {"key_bits": 4, "value_bits": 3, "window": 5, "scheme": "codebook"},
}


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return MODELS["llama"]()


def caches(model: nn.Module, **options: Any) -> tuple[Any, tokred.PackedCache]:
    """The plain torch cache, and ours."""
    ours = tokred.PackedCache(model.config, **options)
    plain = transformers.DynamicCache(config=model.config)
    plain.layers = [
        Transcribed(ours.options) if type(layer) is DynamicLayer else layer
        for layer in plain.layers
    ]
    return plain, ours


def in_parts(model: nn.Module, ids: Tensor, mask: Tensor, parts: tuple, cache: Any) -> Tensor:
    """The logits of the tokens that are no padding, from forward passes of so many tokens."""
    model.set_attn_implementation(attention.register())
    logits, start = [], 0
    for length in parts:
        stop = start + length
        with torch.no_grad():
            logits.append(
                model(ids[:, start:stop], attention_mask=mask[:, :stop], **{cache_keyword(): cache},
                      position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]).logits
            )  # fmt: skip
        start = stop
    return torch.cat(logits, 1)[mask[:, :start].bool()]


PARTS = (9, 1, 1, 4, 1, 1, 1, 1, 7, 1, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_what_the_oracle_packs(model: nn.Module, name: str) -> None:
    ids, mask = left_padded(2, sum(PARTS))
    plain, ours = caches(model, **FORMATS[name])
    expected = in_parts(model, ids, mask, PARTS, plain)
    actual = in_parts(model, ids, mask, PARTS, ours)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    assert (actual - dense).abs().max() > 1e-2
    assert ours.get_seq_length() == sum(PARTS)


def test_eight_bits_are_close_to_dense(model: nn.Module) -> None:
    ids, mask = left_padded(2, sum(PARTS))
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    errors = []
    for bits in (8, 4, 2):
        cache = tokred.PackedCache(model.config, bits, key_axis="channel", window=1)
        logits = in_parts(model, ids, mask, PARTS, cache)
        errors.append(((logits - dense).norm() / dense.norm()).item())
    assert errors[0] < 0.03 and 4 * errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}], ids=str
)
def test_generation_within_the_window_is_that_of_eager(
    model: nn.Module, padded: bool, options: dict
) -> None:
    ids, mask = left_padded()
    mask = mask if padded else None
    model.set_attn_implementation("eager")
    expected = generated(model, ids, mask, **options)
    model.set_attn_implementation(attention.register())
    for window in ({"key_axis": "channel", "window": 32}, {"key_axis": "token", "window": 32}):
        cache = tokred.PackedCache(model.config, 2, **window)
        assert torch.equal(
            generated(model, ids, mask, **{cache_keyword(): cache}, **options), expected
        )


@pytest.mark.parametrize("name", ["4 bits", "2 bits"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation_is_that_of_the_oracle(llama: nn.Module, name: str, options: dict) -> None:
    llama.set_attn_implementation(attention.register())
    ids, mask = left_padded()
    options = {"max_new_tokens": 12, **options}
    plain, ours = caches(llama, **FORMATS[name])
    expected = generated(llama, ids, mask, **{cache_keyword(): plain}, **options)
    assert torch.equal(generated(llama, ids, mask, **{cache_keyword(): ours}, **options), expected)
    assert not torch.equal(generated(llama, ids, mask, **options), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = MODELS["llama"]().to(dtype)
    ids, mask = left_padded(2, sum(PARTS))
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    cache = tokred.PackedCache(model.config, 8, window=5)
    logits = in_parts(model, ids, mask, PARTS, cache)
    assert logits.dtype == dtype and cache.layers[0].windows["key"].dtype == dtype
    assert (logits - dense).norm() < 0.05 * dense.norm()


def test_a_copy_goes_its_own_way(llama: nn.Module) -> None:
    """A prompt is read once, and continued from copies of its cache."""
    ids, mask = left_padded(2, 30)
    prompt = tokred.PackedCache(llama.config, **FORMATS["4 bits"])
    in_parts(llama, ids, mask, (20,), prompt)
    results = []
    for cache in (copy.deepcopy(prompt), copy.deepcopy(prompt), prompt):
        assert cache.get_seq_length() == 20
        with torch.no_grad():
            for place in range(20, 30):
                output = llama(ids[:, place, None], attention_mask=mask[:, : place + 1],
                               **{cache_keyword(): cache})  # fmt: skip
        results.append(output.logits)
    assert_bitwise_equal(results[1:], results[:1] * 2)


def test_assisted_generation_rolls_back(llama: nn.Module) -> None:
    llama.set_attn_implementation(attention.register())
    ids = torch.randint(3, 97, (1, 6), generator=generator(5)).repeat(1, 4)
    expected = generated(llama, ids, None, max_new_tokens=12)
    removed = []
    for window in (8, 48):
        cache = tokred.PackedCache(llama.config, 8, window=window)
        crop = cache.crop
        cache.crop = lambda count, crop=crop: (removed.append(count), crop(count))
        actual = generated(
            llama,
            ids,
            None,
            max_new_tokens=12,
            **{cache_keyword(): cache},
            prompt_lookup_num_tokens=3,
        )
        assert torch.equal(actual, expected)
    assert min(removed) < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 1, 2, 3, 4 or 8, got 5"),
        ({"value_bits": 6}, "got 6"),
        ({"key_axis": "heads"}, "key_axis must be"),
        ({"scheme": "log"}, "scheme must be"),
        ({"scheme": "fp8"}, "needs 8 bits, got 4"),
        ({"bits": 1, "scheme": "symmetric"}, "at least 2 bits"),
        ({"bits": 8, "scheme": "codebook"}, "at most 16 levels, 4 bits, got 8"),
        ({"scheme": "codebook", "key_axis": "token"}, "needs key_axis='channel'"),
        ({"window": -1}, "window must be at least 0"),
        ({"window": 2**31}, "at most 2147483647, got 2147483648"),
        ({"capacity": 2**31}, "at most 2147483647, got 2147483648"),
        ({"bits": 2, "window": 0}, "multiple of the 32 tokens of a group"),
        ({"key_axis": "token", "group_size": 24, "window": 32}, "multiple of the 24 tokens"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"capacity": 0}, "capacity must be at least 1"),
    ],
)
def test_options_that_do_not_fit(llama: nn.Module, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokred.PackedCache(llama.config, **changes)


def test_models_that_do_not_fit() -> None:
    config = transformers.MistralConfig(num_hidden_layers=2, sliding_window=8)
    with pytest.raises(ValueError, match="layers of full attention, and MistralConfig has none"):
        tokred.PackedCache(config)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_is_told_what_to_do(llama: nn.Module, implementation: str) -> None:
    llama.set_attn_implementation(implementation)
    ids, mask = left_padded()
    expected = pytest.raises(ValueError, match=r'PackedCache.*set_attn_implementation\("tokred"\)')
    with torch.no_grad(), expected:
        llama(ids, attention_mask=mask, **{cache_keyword(): tokred.PackedCache(llama.config)})


def test_layers_in_full_precision_count() -> None:
    model = MODELS["gemma3"]()
    ids, mask = left_padded()
    cache = tokred.PackedCache(model.config)
    in_parts(model, ids, mask, (13,), cache)
    sliding, packed = cache.nbytes(0), cache.nbytes(1)
    assert sliding.total == sliding.full_precision >= 2 * 2 * 3 * 5 * 48 * 4
    assert packed.full_precision == 0 and cache.nbytes().total == sliding.total + packed.total


# Methods that choose among the packed tokens.


@pytest.mark.parametrize("name", ["4 bits", "2 bits"])
def test_top_k_attention_on_packed_keys(llama: nn.Module, name: str) -> None:
    ids, mask = left_padded(2, sum(PARTS))
    steps = (9, *(1 for _ in range(sum(PARTS) - 9)))
    results = []
    for cache in caches(llama, **FORMATS[name]):
        with tokred.patch(llama, "top_k_attention", k=4):
            results.append(in_parts(llama, ids, mask, steps, cache))
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2e-3)
    everything = []
    for k in (3, sum(PARTS)):
        cache = tokred.PackedCache(llama.config, **FORMATS[name])
        with tokred.patch(llama, "top_k_attention", k=k, prefill="dense"):
            everything.append(in_parts(llama, ids, mask, PARTS, cache))
    plain = tokred.PackedCache(llama.config, **FORMATS[name])
    expected = in_parts(llama, ids, mask, PARTS, plain)
    assert_bitwise_equal(everything[1], expected)
    assert not torch.allclose(everything[0], expected, atol=1e-2)


@pytest.mark.parametrize("name", ["4 bits", "2 bits"])
def test_token_select_on_packed_keys(llama: nn.Module, name: str) -> None:
    ids, mask = left_padded(2, sum(PARTS))
    steps = (9, *(1 for _ in range(sum(PARTS) - 9)))
    chosen = {"k": 2, "n_init": 1, "n_local": 2, "pool": 3}
    results = []
    for cache in caches(llama, **FORMATS[name]):
        with tokred.patch(llama, "token_select", **chosen):
            results.append(in_parts(llama, ids, mask, steps, cache))
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2e-3)


def test_choosing_every_key_for_parts_of_a_prompt(llama: nn.Module) -> None:
    ids, mask = left_padded()
    expected = in_parts(llama, ids, mask, (9, 2, 2), tokred.PackedCache(llama.config))
    with tokred.patch(llama, "top_k_attention", k=13):
        chosen = in_parts(llama, ids, mask, (9, 2, 2), tokred.PackedCache(llama.config))
    torch.testing.assert_close(chosen, expected, rtol=1e-5, atol=1e-5)
