"""The modules in the place of nn.MultiheadAttention: exact at no-op, trained; what they refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from tokred.nn import (
    BlockSparseAttention,
    MergedAttention,
    PackedKVAttention,
    PackedKVCore,
    TopKAttention,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EMBED, HEADS = 64, 4
# Options with which each of them computes what dense attention does.
NOTHING: dict[type, dict[str, Any]] = {
    TopKAttention: {"k": 99},
    BlockSparseAttention: {"density": 1.0, "block_q": 8, "block_k": 8},
    MergedAttention: {"r": 0},
    PackedKVAttention: {"residual": 99},
}
SOME: dict[type, dict[str, Any]] = {
    TopKAttention: {"k": 5, "block_q": 4},
    BlockSparseAttention: {"k": 1, "block_q": 8, "block_k": 8},
    MergedAttention: {"r": 6},
    PackedKVAttention: {"bits": 8, "group_size": 16},
}
MODULES = pytest.mark.parametrize("kind", NOTHING, ids=lambda kind: kind.__name__)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def mha(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def padding(batch: int, length: int) -> Tensor:
    """Left padding in the first row, right padding in the last; True is padding."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0, : length // 4] = True
    mask[-1, length - length // 5 :] = True
    return mask


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@MODULES
@torch.no_grad()
def test_without_reduction_it_is_multihead_attention(kind: type) -> None:
    x, memory = tokens(20, 2, EMBED), tokens(13, 2, 48, seed=1)
    values = tokens(13, 2, 80, seed=2)
    dense = mha()
    module = kind(EMBED, HEADS, **NOTHING[kind])
    module.load_state_dict(dense.state_dict())
    assert module(x, x, x)[1] is None
    close(module(x, x, x)[0], dense(x, x, x)[0])
    close(module(x[:, 0], x[:, 0], x[:, 0])[0], dense(x[:, 0], x[:, 0], x[:, 0])[0])
    mask = padding(2, 20)
    real = ~mask.T[..., None]
    expected = dense(x, x, x, key_padding_mask=mask)[0] * real
    for given in (mask, torch.zeros(2, 20).masked_fill(mask, -torch.inf)):
        close(module(x, x, x, key_padding_mask=given)[0] * real, expected)
    if kind is not MergedAttention:
        causal = nn.Transformer.generate_square_subsequent_mask(20)
        expected = dense(x, x, x, attn_mask=causal)[0]
        for options in ({"attn_mask": causal}, {"attn_mask": causal < 0}, {"is_causal": True}):
            close(module(x, x, x, **options)[0], expected)
    # Cross-attention from other widths, without biases, batch first.
    dense = mha(kdim=48, vdim=80, bias=False, batch_first=True)
    module = kind.from_mha(dense, **NOTHING[kind])
    assert module.k_proj_weight is dense.k_proj_weight
    assert set(module.state_dict()) == set(dense.state_dict())
    inputs = tuple(t.transpose(0, 1) for t in (x, memory, values))
    close(module(*inputs)[0], dense(*inputs)[0])


def attend(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a module's weights."""
    q, k, v = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))


@torch.no_grad()
def test_merged_tokens_share_a_result() -> None:
    """Beside ToMe's attention on the merged tokens, by gathering."""
    x = tokens(1, 12, EMBED)
    module = MergedAttention.from_mha(mha(batch_first=True), r=4, num_prefix=1)
    q, k, v = attend(module, x)
    token_map = tokred.bipartite_soft_matching(k.mean(1), 4, 1)[0]
    weights = nn.functional.one_hot(token_map.long(), 8).float().T
    sizes = weights.sum(1)
    q, k, v = (weights @ t / sizes[:, None] for t in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5 + sizes.log()
    out = (logits.softmax(-1) @ v)[:, :, token_map.long()]
    close(module(x, x, x)[0], module.out_proj(out.transpose(1, 2).flatten(2)))
    assert len(token_map.unique()) == 8 and sizes.max() > 1
    # Padding changes nothing for the others.
    padded = torch.cat([x, tokens(1, 4, EMBED, seed=3)], 1)
    hidden = torch.arange(16)[None] >= 12
    narrow = MergedAttention.from_mha(mha(batch_first=True), ratio=0.25)
    alone = MergedAttention.from_mha(mha(batch_first=True), r=4)(x, x, x)[0]
    close(narrow(padded, padded, padded, hidden)[0][:, :12], alone)


@torch.no_grad()
def test_packed_keys_are_near() -> None:
    x = tokens(2, 24, EMBED)
    dense = mha(batch_first=True)
    expected = dense(x, x, x)[0]
    errors = []
    for bits in (8, 4, 2):
        module = PackedKVAttention.from_mha(dense, bits=bits, group_size=16, residual=5)
        errors.append((module(x, x, x)[0] - expected).norm() / expected.norm())
    assert errors[0] < 0.01 and errors[0] < errors[1] < errors[2] < 0.7


@MODULES
def test_training(kind: type) -> None:
    x = tokens(2, 16, EMBED).requires_grad_()
    if kind is PackedKVAttention:
        with pytest.raises(ValueError, match="requires grad"):
            kind(EMBED, HEADS, batch_first=True, **SOME[kind])(x, x, x)
        return
    # Exact at no-op, and every parameter learns with fewer keys.
    dense = mha(batch_first=True)
    module = kind.from_mha(copy.deepcopy(dense), **NOTHING[kind])
    for each in (dense, module):
        each(x, x, x)[0].square().sum().backward()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(
            module.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-3
        )
    module = kind.from_mha(mha(batch_first=True), **SOME[kind])
    module(x, x, x)[0].square().sum().backward()
    grads = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)


@torch.no_grad()
def test_encoder_layers_of_torch_call_it() -> None:
    """Their fast path would compute dense attention from the weights."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = tokens(2, 16, EMBED), padding(2, 16)
    expected = encoder(x, src_key_padding_mask=mask)
    for options, same in ((NOTHING, True), (SOME, False)):
        for each in encoder.layers:
            weights = each.self_attn.state_dict()
            each.self_attn = TopKAttention(EMBED, HEADS, batch_first=True, **options[TopKAttention])
            each.self_attn.load_state_dict(weights)
        actual = encoder(x, src_key_padding_mask=mask)
        difference = ((actual - expected).abs() * ~mask[..., None]).max()
        assert (difference < 1e-5) == same


def rotary(length: int, dim: int, first: int = 0) -> tuple[Tensor, Tensor]:
    place = torch.arange(first, first + length)[:, None]
    angle = place / 100 ** (torch.arange(dim // 2) / (dim // 2))
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("kind", [TopKAttention, BlockSparseAttention, PackedKVAttention])
@torch.no_grad()
def test_decoding_is_a_pass_over_all_tokens(kind: type) -> None:
    """transformers' convention: token by token, with grouped heads, rotation and left padding."""
    module = kind(EMBED, HEADS, num_kv_heads=2, layer_idx=0, causal=True, **NOTHING[kind]).eval()
    x, visible = tokens(2, 12, EMBED), ~padding(2, 12)
    visible[-1] = True
    options = {"attention_mask": visible, "position_embeddings": rotary(12, 16)}
    whole, weights = module(x, **options)
    assert weights is None
    square = visible[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    smallest = torch.zeros(2, 1, 12, 12).masked_fill(~square, torch.finfo(torch.float32).min)
    for mask in (square, smallest):
        options["attention_mask"] = mask
        assert_bitwise_equal(module(hidden_states=x, use_cache=False, **options)[0], whole)
    config = LlamaConfig(
        hidden_size=EMBED, num_attention_heads=HEADS, num_key_value_heads=2, num_hidden_layers=1
    )
    packed = kind is PackedKVAttention
    cache = tokred.PackedCache(config, bits=8, group_size=16) if packed else DynamicCache()
    outs = [
        module(
            x[:, start:stop],
            attention_mask=visible[:, :stop],
            position_embeddings=rotary(stop - start, 16, start),
            past_key_values=cache,
            position_ids=None,
        )[0]
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12))
    ]
    allowed = 0.02 if packed else 1e-5
    real = visible[..., None]
    torch.testing.assert_close(torch.cat(outs, 1) * real, whole * real, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("kind", [MergedAttention, PackedKVAttention])
def test_it_compiles_without_breaks(kind: type) -> None:
    module = kind.from_mha(mha(batch_first=True), **SOME[kind]).eval()
    x, mask = tokens(2, 16, EMBED), padding(2, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, x, x, mask)[0], module(x, x, x, mask)[0])


@torch.no_grad()
def test_chosen_dimensions_are_no_weights() -> None:
    dims = torch.arange(8, dtype=torch.int32).expand(HEADS, 8)
    module = TopKAttention(EMBED, HEADS, k=99, scoring=dims)
    dense, x = mha(), tokens(20, 2, EMBED)
    module.load_state_dict(dense.state_dict())
    close(module(x, x, x)[0], dense(x, x, x)[0])
    torch.testing.assert_close(copy.deepcopy(module).core.dims, dims)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [24, 5, 1])
@torch.no_grad()
def test_the_residual_is_of_tokens_not_of_padding(queries: int, causal: bool) -> None:
    """Every row gives what it gives alone, without its padding on either side."""
    core = PackedKVCore(bits=2, group_size=16, residual=6, causal=causal)
    q, k, v = (tokens(3, h, 24, 16, seed=h) for h in (4, 2, 2))
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, :4], mask[2, 20:] = False, False
    out = core(q[:, :, 24 - queries :], k, v, mask)
    for row, real in enumerate(mask):
        first, last = real.nonzero()[[0, -1], 0].tolist()
        begin = max(first, 24 - queries)
        if begin > last:
            continue
        part = slice(first, last + 1)
        alone = (x[row : row + 1, :, part] for x in (k, v))
        expected = core(q[row : row + 1, :, begin : last + 1], *alone)
        close(out[row, :, begin - 24 + queries : last + 1 - 24 + queries], expected[0])


@pytest.mark.parametrize("kind", [TopKAttention, PackedKVAttention])
@torch.no_grad()
def test_a_refused_mask_leaves_the_cache_as_it_was(kind: type) -> None:
    module = kind(EMBED, HEADS, **SOME[kind], layer_idx=0, batch_first=True)
    config = LlamaConfig(
        hidden_size=EMBED, num_attention_heads=HEADS, num_hidden_layers=1, head_dim=16
    )
    packs = kind is PackedKVAttention
    cache = tokred.PackedCache(config, group_size=16) if packs else DynamicCache(config=config)
    x = tokens(2, 8, EMBED)
    module(x, cache=cache)
    for mask in (torch.ones(2, 8), torch.ones(2, 1, 3, 9), torch.ones(2, 9)[None, None, None]):
        with pytest.raises(ValueError, match="attention_mask"):
            module(x[:, :1], cache=cache, attention_mask=mask)
        assert cache.get_seq_length(0) == 8
    older = copy.deepcopy(cache)
    step = module(x[:, :1], cache=cache, attention_mask=torch.ones(2, 9))[0]
    named = module(x[:, :1], past_key_values=older, attention_mask=torch.ones(2, 9))[0]
    assert_bitwise_equal(step, named)


X = torch.zeros(2, 8, EMBED)
BATCH_FIRST = {"k": 4, "batch_first": True}


def top_k(**options: Any) -> TopKAttention:
    return TopKAttention(EMBED, HEADS, **{**BATCH_FIRST, **options})


REFUSED: list[tuple[str, Any, str]] = [
    ("heads", lambda: TopKAttention(EMBED, 5, k=1), "multiple of num_heads"),
    ("option", lambda: MergedAttention(EMBED, HEADS), "one of r and ratio"),
    ("ratio", lambda: MergedAttention(EMBED, HEADS, ratio=2.0), "between 0 and 1"),
    ("residual", lambda: PackedKVAttention(EMBED, HEADS, residual=-1), "at least 0"),
    ("bias_kv", lambda: TopKAttention.from_mha(mha(add_bias_kv=True), k=1), "add_bias_kv"),
    ("kv heads", lambda: TopKAttention.from_mha(mha(), k=1, num_kv_heads=2), "num_kv_heads must"),
    ("density", lambda: BlockSparseAttention(EMBED, HEADS, density=2.0), "density must be between"),
    ("1-D", lambda: top_k()(X[0, 0], X, X), r"query must be \[B, N, 64\]"),
    ("key", lambda: top_k()(X, X[0], X), r"key must be \[B, N, 64\]"),
    (
        "channels",
        lambda: top_k()(X, X, X[..., :5]),
        r"value must be .*got \[2, 8, 5\]",
    ),
    ("dropout", lambda: top_k(dropout=0.1)(X, X, X), "no dropout"),
    ("weights", lambda: top_k()(X, X, X, need_weights=True), "need_weights"),
    ("output_attentions", lambda: top_k()(X, output_attentions=True), "output_attentions"),
    ("nothing", lambda: top_k()(), "give query"),
    ("value", lambda: top_k()(X, X), "together"),
    ("attention_mask", lambda: top_k()(X, X, X, attention_mask=X), "take no attention_mask"),
    ("key_padding_mask", lambda: top_k()(X, key_padding_mask=X), "attention_mask in the place"),
    ("mask shape", lambda: top_k()(X, X, X, torch.zeros(8, 2).bool()), r"must be \[2, 8\]"),
    ("mask dtype", lambda: top_k()(X, X, X, torch.zeros(2, 8).long()), "bool or float"),
    ("mask value", lambda: top_k()(X, X, X, torch.ones(2, 8)), "no other numbers"),
    ("attn_mask", lambda: top_k()(X, X, X, attn_mask=torch.eye(8).bool()), "padding, causality"),
    ("3-D", lambda: top_k()(X, X, X, attn_mask=torch.zeros(8, 8, 8)), "same for all heads"),
    ("lengths", lambda: top_k()(X[:, :4], X, X, is_causal=True), "as many queries as keys"),
    ("unknown", lambda: top_k()(X, sinks=1), "does not know sinks"),
    ("heads' mask", lambda: top_k()(X, attention_mask=torch.ones(2, 4, 8, 8)), "all heads"),
    ("rotation", lambda: top_k()(X, position_embeddings=(X, X)), "position_embeddings"),
    (
        "two caches",
        lambda: top_k()(X, cache=DynamicCache(), past_key_values=DynamicCache()),
        "give one",
    ),
    ("layer", lambda: top_k()(X, past_key_values=DynamicCache()), "layer_idx"),
    (
        "unpacked",
        lambda: PackedKVAttention(EMBED, HEADS, layer_idx=0)(X, past_key_values=DynamicCache()),
        "no tokred.PackedCache",
    ),
    (
        "merged cache",
        lambda: MergedAttention(EMBED, HEADS, r=1)(X, past_key_values=DynamicCache()),
        "no use for a cache",
    ),
    ("merged causal", lambda: MergedAttention(EMBED, HEADS, r=1)(X, is_causal=True), "causality"),
    (
        "merged queries",
        lambda: MergedAttention(EMBED, HEADS, r=1)(X[:1], X, X),
        "merge_queries=False",
    ),
    (
        "merged cross-attention",
        lambda: MergedAttention(EMBED, HEADS, r=1)(X, X + 1, X),
        "one and the same tensor",
    ),
    (
        "rotated residual",
        lambda: PackedKVAttention(EMBED, HEADS, group_size=16, rotate=True, residual=1)(X, X, X),
        "residual = 0",
    ),
]


@pytest.mark.parametrize(
    ("call", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_refused_says_why(call: Any, message: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match=r"nn\.MultiheadAttention"):
        TopKAttention.from_mha(nn.Linear(1, 1), k=1)


def test_no_tokens_under_a_mask() -> None:
    x = tokens(2, 0, EMBED)
    assert top_k()(x, x, x, attn_mask=torch.zeros(0, 0).bool())[0].shape == (2, 0, EMBED)
