"""One layer of a PackedCache: appending, cropping, its memory, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tokred
from cases.cache_layers import assert_same, attended, filled, options, query, states
from cases.cache_oracle import seen, through_codes
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.oracle import reference
from cases.tiny_models import transformers
from tokred.cache import CacheBytes, PackedCacheLayer
from tokred.integrations.transformers.attention import attention_forward
from tokred.integrations.transformers.packed_states import PackedStates
from tokred.reference.kv_pack import packed_tokens


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


AXES = pytest.mark.parametrize(
    "axis",
    [{"window": 0}, {"window": 5}, {"key_axis": "token", "group_size": 16, "window": 32}],
    ids=str,
)


@AXES
def test_the_moments_of_arrival_do_not_matter(axis: dict) -> None:
    """Without the mean, which is of the keys that are there when packing begins."""
    whole = filled(75, **axis, center=False)
    grown = PackedCacheLayer(options(**axis, center=False))
    parts = [1, 0, 30, 1, 1, 9, 33]
    for key, value in zip(*(side.split(parts, 2) for side in states(75)), strict=True):
        handle, same = grown.update(key, value)
        assert same is handle and handle.length == grown.get_seq_length()
        assert grown.get_mask_sizes(3) == (grown.length + 3, 0)
    assert grown.length == 75 and whole.length == 75
    assert_same(grown, whole)
    assert_bitwise_equal(attended(grown), attended(whole))


@AXES
@pytest.mark.parametrize("left", [74, 70, 64, 48, 33, 32, 5, 0])
def test_crop(axis: dict, left: int) -> None:
    layer = filled(75, **axis)
    sides = []
    means = layer.key_mean, None
    for raw, packed, mean in zip(states(75), layer.packed, means, strict=True):
        form, window = packed.format, layer.options.window
        held = packed_tokens(form.axis, window, 75)
        tokens = torch.cat([through_codes(raw[:, :, :held], form, mean), raw[:, :, held:]], 2)
        sides.append(tokens[:, :, :left])
    layer.crop(left - 75)
    assert layer.length == left
    expected = reference.biased_attention(query(), *sides)
    torch.testing.assert_close(attended(layer), expected, rtol=1e-4, atol=1e-5)


@AXES
def test_tokens_after_a_crop(axis: dict) -> None:
    layer = filled(75, **axis)
    before = attended(layer)
    layer.crop(0)
    assert_bitwise_equal(attended(layer), before)
    layer.crop(-3)
    handle, _ = layer.update(*(side[:, :, 72:] for side in states(75)))
    assert handle.length == 75
    # 72 and 75 tokens leave the same ones packed along tokens, so the cache is the same again.
    if layer.options.key_axis == "token" or axis["window"] == 0:
        torch.testing.assert_close(attended(layer), before)
    else:
        torch.testing.assert_close(attended(layer), before, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="as a negative one, got 2"):
        layer.crop(2)
    with pytest.raises(ValueError, match="holds 75 tokens, 76 cannot go"):
        layer.crop(-76)


@AXES
def test_rows_of_the_batch(axis: dict) -> None:
    out, lse = attended(filled(75, **axis))
    for change, rows in (
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        layer = filled(75, **axis)
        change(layer)
        assert_bitwise_equal(attended(layer), (out[rows], lse[rows]))
        layer.update(*states(2, batch=len(rows)))
        assert layer.length == 77


def test_offload_and_prefetch() -> None:
    layer = filled(40)
    before = attended(layer)
    layer.offload()
    layer.prefetch()
    assert_bitwise_equal(attended(layer), before)


def test_reset_forgets_everything() -> None:
    layer = filled(40)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes() == CacheBytes()
    layer.update(*states(3, batch=1, dtype=torch.bfloat16))
    assert layer.length == 3


def test_capacity() -> None:
    layer = filled(33, capacity=40)
    assert layer.get_max_length() == layer.get_max_cache_shape() == 40
    pointers = [tensor.data_ptr() for tensor in layer.contents.tensors().values()]
    for _ in range(7):
        layer.update(*states(1))
    assert pointers == [tensor.data_ptr() for tensor in layer.contents.tensors().values()]
    before = attended(layer)
    with pytest.raises(ValueError, match=r"capacity of 40 tokens and holds 40: .*nothing was"):
        layer.update(*states(1))
    assert layer.length == 40
    assert_bitwise_equal(attended(layer), before)
    assert filled(3).get_max_length() == -1


def test_no_tokens() -> None:
    layer = PackedCacheLayer(options())
    handle, _ = layer.update(*states(0))
    assert handle.length == 0 and handle.is_first
    layer.update(*states(50))
    before = attended(layer)
    handle, _ = layer.update(*states(0))
    assert_bitwise_equal(attended(layer), before)
    out, lse = handle.attend(query()[:, :, :0], None, True, None)
    assert out.shape == (3, 4, 0, 32) and lse.shape == (3, 4, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            states(1, dtype=torch.float64),
            r"keys in float32, float16 and bfloat16, got torch.float64",
        ),
        (states(1, batch=2), r"keys \[B, Hkv, L, D\] = \[3, 2, 1, 64\], got \[2, 2, 1, 64\]"),
        ((states(1)[0], states(2)[1]), r"the same tokens .* \[3, 2, 1, 64\] .* \[3, 2, 2, 32\]"),
        ((states(2)[0].mT.contiguous().mT, states(2)[1]), r"keys whose last dimension is contig"),
        ((states(2)[0], states(2)[1].mT.contiguous().mT), r"values whose last dimension is contig"),
        ((states(2)[0], states(2)[1].requires_grad_()), "value_states requires grad"),
        ((states(1)[0][0], states(1)[1]), r"keys \[B, Hkv, L, D\], got \[2, 1, 64\]"),
        ((states(1)[0], None), r"values \[B, Hkv, L, D\], got NoneType"),
        ((states(1)[0].to("meta"), states(1)[1].to("meta")), "holds keys on cpu, got meta"),
        ((states(1)[1], states(1)[1]), r"keys .* = \[3, 2, 1, 64\], got"),
    ],
)
def test_other_tokens_are_refused(changed: tuple, message: str) -> None:
    layer = filled(40)
    before = attended(layer)
    with pytest.raises(ValueError, match=message):
        layer.update(*changed)
    assert layer.length == 40
    assert_bitwise_equal(attended(layer), before)


def test_dimensions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"head_dim that is a multiple of 16.*keys is 8"):
        PackedCacheLayer(options()).update(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    with pytest.raises(ValueError, match="divides the head_dim of the values, 32, got 64"):
        PackedCacheLayer(options(group_size=64)).update(*states(3))
    with pytest.raises(ValueError, match=r"float32, float16 and bfloat16, got torch.float64"):
        PackedCacheLayer(options()).update(*states(3, dtype=torch.float64))


def test_the_handle_is_no_tensor() -> None:
    handle, _ = filled(40).update(*states(1))
    assert isinstance(handle, PackedStates) and not handle.is_first
    q = torch.randn(3, 4, 1, 64)
    for use in (
        lambda: handle.transpose(1, 2),
        lambda: handle[:, :, :3],
        lambda: torch.cat([handle, handle], 2),
        lambda: torch.matmul(q, handle),
        lambda: q @ handle,
        lambda: tokred.biased_attention(q, handle, handle),
        lambda: nn.functional.scaled_dot_product_attention(q, handle, handle),
    ):
        with pytest.raises((AttributeError, ValueError), match="PackedCache"):
            use()


# Memory.


def test_every_byte_is_counted() -> None:
    for axis in ({"window": 0}, {"window": 5}, {"bits": 2}):
        layer = filled(200, **axis)
        tensors = layer.contents.tensors().values()
        assert layer.nbytes().total == sum(t.untyped_storage().nbytes() for t in tensors)
    layer = filled(200, window=5, bits=4)
    # 3 rows, 2 heads, 195 packed tokens: 64 + 32 channels in 4 bits, a group a side.
    assert layer.nbytes().codes == 3 * 2 * 195 * (32 + 16)
    assert layer.nbytes().params == 3 * 2 * 195 * (4 + 4)
    assert layer.nbytes().window == 3 * 2 * (5 * (64 + 32) + 64) * 4  # and the mean
    assert 0 < layer.nbytes().slack < 3 * 2 * (200 / 16 + 16) * 56
    layer = filled(200, bits=2, group_size=32, window=64)
    # 192 packed keys with a group of tokens for every channel, 136 packed values.
    assert layer.nbytes().codes == 3 * 2 * (192 * 16 + 136 * 8)
    assert layer.nbytes().params == 3 * 2 * (6 * 64 * 4 + 136 * 4)
    window = layer.nbytes().window
    layer.update(*states(7))
    # What can be taken back: the windows before, and the tokens.
    assert layer.nbytes().window == 2 * window + 3 * 2 * 7 * (64 + 32) * 4


@pytest.mark.parametrize(("bits", "share"), [(8, 0.6), (4, 0.34), (3, 0.33), (2, 0.27)])
def test_a_long_context_takes_little(bits: int, share: float) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    cache = tokred.PackedCache(config, bits)
    sides = [torch.randn(1, 2, 1024, 64, dtype=torch.float16) for _ in range(2)]
    for length in (1024, 1, 1024):
        for layer in range(2):
            cache.update(*(side[:, :, :length] for side in sides), layer)
        dense = 2 * 2 * 2 * 64 * 2 * cache.get_seq_length()
        assert cache.nbytes().total <= share * dense
    assert cache.nbytes() == cache.nbytes(0) + cache.nbytes(1)
    assert cache.bytes_per_token() == cache.nbytes().total / cache.get_seq_length()
    assert tokred.PackedCache(config).bytes_per_token() == 0


def test_lists_of_keys_and_sinks() -> None:
    """The attention function by itself, on indices that a model brings."""
    layer = filled(40, window=5)
    handle, _ = layer.update(*states(1, seed=1))
    q = torch.randn(3, 4, 1, 64, generator=generator(9))
    indices = torch.randint(-1, 42, (3, 1, 7), generator=generator(2), dtype=torch.int32)
    sinks = torch.randn(4, generator=generator(3))
    module = nn.Module()
    out, _ = attention_forward(module, q, handle, None, None, indices=indices, s_aux=sinks)
    raw = (torch.cat(pair, 2) for pair in zip(states(40), states(1, seed=1), strict=True))
    means = layer.key_mean, None
    tokens = [
        seen(s, p.format, 5, 1, mean) for s, p, mean in zip(raw, layer.packed, means, strict=True)
    ]
    listed, lse = reference.sparse_attention(q, *tokens, indices[:, None])
    expected = listed * torch.sigmoid(lse - sinks[:, None])[..., None]
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sliding_window needs keys in full precision"):
        attention_forward(module, q, handle, None, None, sliding_window=8)


def test_default_options() -> None:
    assert options() == replace(options(bits=8), key_bits=4, value_bits=4)
    assert options(bits=2).key_axis == "token" and options(bits=2).window == 64
    assert options(bits=4, value_bits=2).key_bits == 4
    assert options(bits=2, group_size=48).window == 96
    assert options(bits=4, group_size=48).window == 32
    assert options(bits=4).center and not options(bits=2).center
