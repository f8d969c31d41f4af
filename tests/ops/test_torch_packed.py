"""The ops on packed keys and values inside torch's machinery, as test_torch.py has it."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.oracle import reference
from cases.torch_ops import assert_compiles_once, flops, tokens
from tokred import PackFormat

OPS = torch.ops.tokred
TOKENWISE = PackFormat(4, 8, "token")
CHANNELWISE = PackFormat(3, 16, "channel", "symmetric", True)


def packed(form: PackFormat, *shape: int) -> tokred.PackedKV:
    return reference.kv_pack(tokens(*shape), *astuple(form))


def opcheck_cases() -> dict[str, tuple]:
    x, wide = tokens(2, 2, 24, 32), tokens(2, 2, 24, 48)
    outer = tokens(2, 24, 2, 32).transpose(1, 2)
    q, many = tokens(2, 4, 1, 32), tokens(2, 9, 4, 32).transpose(1, 2)
    keys = packed(TOKENWISE, 2, 2, 24, 32).arguments()
    values = packed(CHANNELWISE, 2, 2, 24, 48).arguments()
    windows = [tokens(2, 2, 8, 32), tokens(2, 2, 8, 48)]
    indices = torch.randint(-1, 25, (2, 2, 1, 5), generator=generator(), dtype=torch.int32)
    mask = torch.rand(2, 1, 1, 32, generator=generator()) < 0.7
    bias, lengths = torch.rand(2, 2, 32), torch.tensor([30, 7], dtype=torch.int32)
    pool = packed(TOKENWISE, 1, 2, 48, 32).arguments()
    pages = torch.arange(48).view(2, 24).int()
    value_pool = packed(CHANNELWISE, 1, 2, 48, 48).arguments()
    visible = torch.ones(1, 32, dtype=torch.bool)
    cases = {
        "unpack": (OPS.kv_unpack, (*keys, "float32")),
        "unpack rotated": (OPS.kv_unpack, (*values, "bfloat16")),
        "append": (OPS.kv_append, (wide, *values[:2], None, 0, *values[2:])),
        "append window": (
            OPS.kv_append,
            (x[:, :, :9], *keys[:2], windows[0], 3, *keys[2:], lengths.clamp(max=3)),
        ),
        "append pages": (
            OPS.kv_append,
            (wide, *value_pool[:2], None, 0, *value_pool[2:], None, pages),
        ),
        "attention": (OPS.packed_attention, (q, *keys, *values)),
        "attention windows": (
            OPS.packed_attention,
            (many, *keys, *values, *windows, 0.3, None, mask, bias, True),
        ),
        "attention cache": (
            OPS.packed_attention,
            (many, *keys, *values, *windows, None, indices, mask, None, True, 32, lengths),
        ),
        "attention pages": (
            OPS.packed_attention,
            (q, *pool, *value_pool, *([None] * 6), False, 20, None, pages),
        ),
        "score": (OPS.packed_qk_score, (many, *keys)),
        "score cache": (
            OPS.packed_qk_score,
            (q, *keys, windows[0], "group_max", 0.3, 32, lengths, visible),
        ),
        "score pages": (
            OPS.packed_qk_score,
            (q, *pool, None, "softmax_vote", None, None, None, None, pages),
        ),
    }
    for name, form in (("tokens", TOKENWISE), ("channels", CHANNELWISE)):
        cases[f"pack {name}"] = (OPS.kv_pack, (x, *astuple(form)))
        cases[f"pack {name} views"] = (OPS.kv_pack, (outer.half(), *astuple(form)))
    return cases


CASES = opcheck_cases()


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    op, args = CASES[case]
    torch.library.opcheck(op.default, args)


def pack_and_attend(x: Tensor) -> tuple[Tensor, ...]:
    """Everything but growing: pack, score, choose, attend, unpack."""
    keys = tokred.kv_pack(x, 4, 32, scheme="zero_point", rotate=True)
    values = tokred.kv_pack(x, 2, 16)
    q = x[:, :, -1:].repeat_interleave(2, 1)
    scores = tokred.packed_qk_score(q, keys, reduce="group_mean")
    _, chosen = tokred.topk(scores, 5)
    listed = tokred.packed_attention(q, keys, values, indices=chosen[:, :, None])
    dense = tokred.packed_attention(x, keys, values, key_bias=scores[:, 0], causal=True)
    return *listed, *dense, scores, tokred.kv_unpack(values, torch.float16), keys.scale


def grow_and_attend(x: Tensor) -> tuple[Tensor, ...]:
    """A cache of one window, of which the length is a number of the graph."""
    batch, heads, length, dim = x.shape
    keys = PackFormat(2, 8, "token").empty(batch, heads, 96, dim)
    values = PackFormat(4, 16).empty(batch, heads, 96, dim)
    window_k, window_v = x.new_zeros(batch, heads, 8, dim), x.new_zeros(batch, heads, 20, dim)
    tokred.kv_append(x, keys, 0, window_k)
    tokred.kv_append(x, values, 0, window_v)
    tokred.kv_append(x[:, :, :1], keys, length, window_k)
    tokred.kv_append(x[:, :, :1], values, length, window_v)
    cache = {"length": length + 1}
    out, lse = tokred.packed_attention(x[:, :, :1], keys, values, window_k, window_v, **cache)
    return out, lse, tokred.packed_qk_score(x, keys, window_k, "head_mean", **cache), keys.codes


FUNCTIONS = [pack_and_attend, grow_and_attend]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_without_breaks_or_recompiles(function) -> None:
    calls = [(tokens(2, 2, length, 32),) for length in (21, 30, 33)]
    assert_compiles_once(function, calls)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inductor(function) -> None:
    compiled = torch.compile(function, fullgraph=True)
    x = tokens(2, 2, 21, 32)
    with torch.no_grad():
        assert_bitwise_equal(compiled(x), function(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_export_with_a_dynamic_length(function, strict: bool) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return function(x)

    length = torch.export.Dim("length", min=12, max=64)
    program = torch.export.export(
        Block(), (tokens(2, 2, 21, 32),), dynamic_shapes={"x": {2: length}}, strict=strict
    )
    x = tokens(2, 2, 40, 32)
    assert_bitwise_equal(program.module()(x), function(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_replay() -> None:
    x = tokens(2, 2, 40, 32).cuda()
    with torch.no_grad():
        pack_and_attend(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = pack_and_attend(x)
        x.copy_(x.flip(1))
        graph.replay()
        for result, expected in zip(captured, pack_and_attend(x), strict=True):
            assert_bitwise_equal(result.cpu(), expected.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_step_follows_the_lengths() -> None:
    """One graph for all steps: the lengths are a tensor, the largest length is fixed."""
    keys, values = (
        form.empty(2, 2, 64, 32, "cuda") for form in (PackFormat(4, 8, "token"), PackFormat(4, 16))
    )
    windows = [tokens(2, 2, rows, 32).cuda().zero_() for rows in (8, 12)]
    one, lengths = tokens(2, 2, 1, 32).cuda(), torch.zeros(2, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        for side, window in zip((keys, values), windows, strict=True):
            tokred.kv_append(one, side, 63, window, lengths)
        lengths.add_(1)
        return tokred.packed_attention(one, keys, values, *windows, length=64, lengths=lengths)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (lengths, keys.codes, values.codes, *windows):
        tensor.zero_()
    rows = tokens(30, 2, 2, 1, 32)
    for row in rows:
        one.copy_(row)
        graph.replay()
    cache = [form.format.empty(2, 2, 64, 32) for form in (keys, values)]
    plain = [torch.zeros(2, 2, size, 32) for size in (8, 12)]
    for token, row in enumerate(rows):
        for side, window in zip(cache, plain, strict=True):
            reference.kv_append(row, side, token, window)
    expected = reference.packed_attention(rows[-1], *cache, *plain, length=30)
    for actual, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones() -> None:
    x = tokens(2, 2, 24, 32)
    real = pack_and_attend(x)
    with FakeTensorMode() as mode:
        fake = pack_and_attend(mode.from_tensor(x))
    for actual, expected in zip(fake, real, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()


def test_gradients_are_refused() -> None:
    needing, x = tokens(2, 2, 24, 32, grad=True), tokens(2, 2, 24, 32)
    keys = packed(TOKENWISE, 2, 2, 24, 32)
    for call in (
        lambda: tokred.kv_pack(needing, 4, 32),
        lambda: tokred.kv_append(needing, keys, 0),
        lambda: tokred.packed_attention(needing, keys, keys),
        lambda: tokred.packed_attention(x, keys, keys, needing, x),
        lambda: tokred.packed_attention(x, keys, keys, x, needing),
        lambda: tokred.packed_qk_score(needing, keys),
        lambda: tokred.packed_qk_score(x, keys, needing),
    ):
        with pytest.raises(ValueError, match="grad"):
            call()
    with torch.no_grad():
        assert tokred.kv_pack(needing, 4, 32).codes.shape == (2, 2, 24, 16)


def test_inference_mode() -> None:
    x = tokens(2, 2, 21, 32)
    expected = grow_and_attend(x)
    with torch.inference_mode():
        assert_bitwise_equal(grow_and_attend(x), expected)


def test_flop_counts() -> None:
    q = tokens(2, 4, 5, 32)
    keys, values = packed(TOKENWISE, 2, 2, 24, 32), packed(CHANNELWISE, 2, 2, 24, 48)
    indices = torch.zeros(2, 2, 1, 3, dtype=torch.int32)

    pair = 2 * 2 * 4 * 5
    dense = flops(lambda: tokred.packed_attention(q, keys, values))
    listed = flops(lambda: tokred.packed_attention(q, keys, values, indices=indices))
    assert dense == pair * 24 * (32 + 48) and listed == pair * 3 * (32 + 48)
    assert flops(lambda: tokred.packed_qk_score(q, keys)) == 2 * 2 * 4 * 24 * 32


def test_sizes_of_a_packed_tensor() -> None:
    keys, values = packed(TOKENWISE, 2, 2, 24, 32), packed(CHANNELWISE, 2, 2, 24, 48)
    assert keys.head_dim == 32 and values.head_dim == 48 and keys.num_tokens == 24
    assert keys.nbytes == 4 * 24 * (16 + 2 * 2 * 32 // 8) == 4 * 24 * TOKENWISE.token_bytes(32)
    assert values.nbytes == 4 * 24 * CHANNELWISE.token_bytes(48) == 4 * 24 * (18 + 6)
    assert keys.scale.shape == keys.minimum.shape == (2, 2, 3, 32)
    assert values.scale.shape == (2, 2, 24, 3) and values.minimum is None
    room = TOKENWISE.empty(2, 2, 24, 32)
    assert room.codes.shape == keys.codes.shape and room.params.shape == keys.params.shape
