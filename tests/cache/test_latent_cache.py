"""PackedCache and DenseCache of latents (multi-head latent attention), against plain torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.cache_oracle import TranscribedLatents
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.compat import cache_keyword
from tokred.integrations.transformers import attention

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32,
    qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=40, n_routed_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
    first_k_dense_replace=1, head_dim=16,
)  # fmt: skip
DENSE = {name: size for name, size in SIZES.items() if "exp" not in name and "group" not in name}
MODELS = {
    "deepseek_v2": lambda: tiny_lm("DeepseekV2", **SIZES),
    "deepseek_v3": lambda: tiny_lm("DeepseekV3", **SIZES),
    "not interleaved": lambda: tiny_lm("DeepseekV3", **SIZES, rope_interleave=False),
    "minicpm3": lambda: tiny_lm("MiniCPM3", **DENSE),
}
FORMATS = {
    "4 bits": {"bits": 4, "window": 5},
    "2 bits": {"bits": 2, "key_axis": "token", "group_size": 8, "window": 8},
    "3 bits, not rotated": {"bits": 3, "key_axis": "channel", "window": 0, "rotate": False},
    "codebook": {"bits": 4, "window": 5, "scheme": "codebook"},
}
PARTS = (9, 1, 1, 4, 1, 1, 7, 1, 1)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def deepseek() -> nn.Module:
    return MODELS["deepseek_v3"]()


def plain_cache(model: nn.Module, options: Any) -> Any:
    plain = transformers.DynamicCache(config=model.config)
    plain.layers = [TranscribedLatents(options) for _ in plain.layers]
    return plain


def in_parts(model: nn.Module, ids: Tensor, mask: Tensor, parts: tuple, cache: Any) -> Tensor:
    """The logits of the tokens that are no padding, from forward passes of so many tokens."""
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


@pytest.mark.parametrize("name", FORMATS)
def test_absorbed_weights_are_the_expansion(model: nn.Module, name: str) -> None:
    """Dense attention, on latents that were packed and unpacked and then expanded.

    The first tokens are those of a DynamicCache, bit for bit.
    """
    ids, mask = left_padded(2, sum(PARTS))
    model.set_attn_implementation(attention.register())
    ours = tokred.PackedCache(model, **FORMATS[name])
    expected = in_parts(model, ids, mask, PARTS, plain_cache(model, ours.options))
    actual = in_parts(model, ids, mask, PARTS, ours)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    assert_bitwise_equal(actual[: PARTS[0]], dense[: PARTS[0]])
    assert (actual - dense).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = MODELS["deepseek_v2"]().to(dtype)
    ids, mask = left_padded(2, sum(PARTS))
    model.set_attn_implementation(attention.register())
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    cache = tokred.PackedCache(model.config, 8, window=5)
    logits = in_parts(model, ids, mask, PARTS, cache)
    assert logits.dtype == dtype and cache.layers[0].windows["key"].dtype == dtype
    assert (logits - dense).norm() < 0.05 * dense.norm()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}], ids=str
)
def test_generation_within_the_window_is_that_of_eager(model: nn.Module, options: dict) -> None:
    ids, mask = left_padded()
    model.set_attn_implementation("eager")
    expected = generated(model, ids, mask, **options)
    model.set_attn_implementation(attention.register())
    cache = tokred.PackedCache(model.config, 2, key_axis="channel", window=32)
    assert torch.equal(generated(model, ids, mask, **{cache_keyword(): cache}, **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_generation_is_that_of_the_oracle(deepseek: nn.Module, options: dict) -> None:
    ids, mask = left_padded()
    options = {"max_new_tokens": 12, **options}
    ours = tokred.PackedCache(deepseek.config, **FORMATS["4 bits"])
    deepseek.set_attn_implementation(attention.register())
    plain = plain_cache(deepseek, ours.options)
    expected = generated(deepseek, ids, mask, **{cache_keyword(): plain}, **options)
    assert torch.equal(
        generated(deepseek, ids, mask, **{cache_keyword(): ours}, **options), expected
    )


def test_latents_in_full_precision(model: nn.Module) -> None:
    """The first tokens are those of a DynamicCache bit for bit, later ones to rounding."""
    ids, mask = left_padded(2, sum(PARTS))
    model.set_attn_implementation(attention.register())
    cache = tokred.DenseCache(model, absorb=True)
    actual = in_parts(model, ids, mask, PARTS, cache)
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    assert_bitwise_equal(actual[: PARTS[0]], dense[: PARTS[0]])
    torch.testing.assert_close(actual, dense, rtol=2e-5, atol=2e-5)
    assert cache.layers[0].keys.shape == (2, 1, sum(PARTS), 48)
    assert cache.nbytes(0).full_precision == 2 * sum(PARTS) * 48 * 4


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}], ids=str
)
def test_generation_from_dense_latents_is_that_of_eager(model: nn.Module, options: dict) -> None:
    ids, mask = left_padded()
    model.set_attn_implementation("eager")
    expected = generated(model, ids, mask, **options)
    model.set_attn_implementation(attention.register())
    cache = tokred.DenseCache(model.config, absorb=True, capacity=64)
    assert torch.equal(generated(model, ids, mask, **{cache_keyword(): cache}, **options), expected)


def test_dense_latents_in_half_precision() -> None:
    model = MODELS["deepseek_v2"]().to(torch.bfloat16)
    ids, mask = left_padded(2, sum(PARTS))
    model.set_attn_implementation(attention.register())
    dense = in_parts(model, ids, mask, PARTS, transformers.DynamicCache(config=model.config))
    logits = in_parts(model, ids, mask, PARTS, tokred.DenseCache(model, absorb=True))
    assert logits.dtype == torch.bfloat16
    assert (logits - dense).norm() < 0.02 * dense.norm()


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_cropping_and_rows_of_the_batch(deepseek: nn.Module, kind: str) -> None:
    """As many tokens again after a crop, and the rows of a batch repeated and chosen."""
    ids, mask = left_padded(2, 30, padding=0)
    deepseek.set_attn_implementation(attention.register())
    cache = (
        tokred.PackedCache(deepseek.config, **FORMATS["4 bits"])
        if kind == "packed"
        else tokred.DenseCache(deepseek.config, absorb=True)
    )
    in_parts(deepseek, ids, mask, (20, 6), cache)
    expected = copy.deepcopy(cache)
    cache.crop(-6)
    with torch.no_grad():
        deepseek(ids[:, 20:26], attention_mask=mask[:, :26], **{cache_keyword(): cache})
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        after, want = (
            deepseek(ids[:, 26:27], attention_mask=mask[:, :27], **{cache_keyword(): each}).logits
            for each in (cache, expected)
        )
    assert_bitwise_equal(after, want)


def test_memory_and_files(deepseek: nn.Module, tmp_path: Any) -> None:
    """A token is its codes and params once: nothing lies beside it as values."""
    ids, mask = left_padded(2, 30)
    deepseek.set_attn_implementation(attention.register())
    cache = tokred.PackedCache(deepseek.config, 4, window=5)
    in_parts(deepseek, ids, mask, (20, 1), cache)
    used = cache.nbytes(0)
    assert used.codes == 2 * 16 * 48 // 2 and used.params == 2 * 16 * 3 * 4
    assert used.window == 2 * 5 * 48 * 4
    cache.save(tmp_path / "cache")
    loaded = tokred.PackedCache.load(tmp_path / "cache", deepseek.config)
    with torch.no_grad():
        after, want = (
            deepseek(ids[:, 21:22], attention_mask=mask[:, :22], **{cache_keyword(): each}).logits
            for each in (loaded, cache)
        )
    assert_bitwise_equal(after, want)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_is_told_what_to_do(deepseek: nn.Module, implementation: str) -> None:
    deepseek.set_attn_implementation(implementation)
    ids, mask = left_padded()
    expected = pytest.raises(ValueError, match=r'PackedCache.*set_attn_implementation\("tokred"\)')
    with torch.no_grad(), expected:
        cache = tokred.PackedCache(deepseek.config)
        deepseek(ids, attention_mask=mask, **{cache_keyword(): cache})


def test_what_dense_latents_refuse(deepseek: nn.Module) -> None:
    config = deepseek.config
    with pytest.raises(ValueError, match="LlamaConfig has none: make the DenseCache without"):
        tokred.DenseCache(tiny_lm("Llama").config, absorb=True)
    with pytest.raises(ValueError, match="with absorb or with score_bits"):
        tokred.DenseCache(config, absorb=True, score_bits=4)
    layer = tokred.DenseCache(config, absorb=True, capacity=4).layers[0]
    heads = torch.randn(1, 4, 3, 40, generator=generator())
    with pytest.raises(ValueError, match=r"DenseCache holds.*\[B, 1, L, 32\].*got \[1, 4, 3, 40\]"):
        layer.update(heads, heads)
    with pytest.raises(ValueError, match="capacity of 4 tokens and holds 0"):
        layer.update(torch.zeros(1, 1, 5, 32), torch.zeros(1, 1, 5, 16))
    with pytest.raises(ValueError, match="of the same tokens"):
        layer.update(torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, 3, 16))
    assert layer.get_seq_length() == 0
    ids, mask = left_padded()
    deepseek.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(ValueError, match="absorb=True holds latents for tokred's"):
        cache = tokred.DenseCache(config, absorb=True)
        deepseek(ids, attention_mask=mask, **{cache_keyword(): cache})
    with (
        torch.no_grad(),
        tokred.patch(deepseek, "top_k_attention", k=4),
        pytest.raises(ValueError, match="do not read latents"),
    ):
        cache = tokred.DenseCache(config, absorb=True)
        deepseek(ids, attention_mask=mask, **{cache_keyword(): cache})


def test_what_is_refused() -> None:
    model = MODELS["deepseek_v3"]()
    ids, mask = left_padded()
    with pytest.raises(ValueError, match=r"keys and values at once.*got 2 and 4"):
        tokred.PackedCache(model.config, 4, value_bits=2)
    with pytest.raises(ValueError, match="its values as well: pass center=False"):
        tokred.PackedCache(model.config, 4, center=True)
    with (
        torch.no_grad(),
        tokred.patch(model, "top_k_attention", k=4),
        pytest.raises(ValueError, match="do not read latents"),
    ):
        model(ids, attention_mask=mask, **{cache_keyword(): tokred.PackedCache(model.config)})
    model.set_attn_implementation(attention.register())
    layer = tokred.PackedCache(model.config).layers[0]
    heads = torch.randn(1, 4, 3, 40, generator=generator())
    with pytest.raises(ValueError, match=r"\[B, 1, L, 32\].*got \[1, 4, 3, 40\]: use"):
        layer.update(heads, heads)
    module = model.model.layers[0].self_attn
    weights = module.kv_b_proj
    module.kv_b_proj = nn.Linear(32, weights.out_features, bias=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"torch.nn.Linear without bias"):
        model(ids, attention_mask=mask, **{cache_keyword(): tokred.PackedCache(model.config)})
    module.kv_b_proj = weights
    expand = module.expand_kv

    def shifted(*latents: Tensor) -> tuple[Tensor, Tensor]:
        key, value = expand(*latents)
        return key, torch.cat((value[..., 1:], value[..., :1]), -1)

    for other, error in (
        (shifted, pytest.raises(ValueError, match="to other keys and values than its kv_b_proj")),
        (
            lambda *x: tuple(y.mul(2) for y in expand(*x)),
            pytest.raises(ValueError, match=r"^mul: the"),
        ),
    ):
        module.expand_kv = other
        with torch.no_grad(), error:
            model(ids, attention_mask=mask, **{cache_keyword(): tokred.PackedCache(model.config)})


@pytest.mark.parametrize("absorb", [False, True])
def test_expansions_that_compute_are_refused(absorb: bool) -> None:
    model = MODELS["deepseek_v3"]()
    model.set_attn_implementation(attention.register())
    ids, mask = left_padded()

    def empty() -> tokred.PackedCache | tokred.DenseCache:
        if absorb:
            return tokred.DenseCache(model.config, absorb=True)
        return tokred.PackedCache(model.config)

    def refused(called: nn.Module, error: type[Exception], words: str) -> None:
        with torch.no_grad(), pytest.raises(error, match=words):
            called(ids, attention_mask=mask, **{cache_keyword(): empty()})

    linear = model.model.layers[0].self_attn.kv_b_proj
    hook = linear.register_forward_hook(lambda module, args, out: out * 2.0)
    refused(model, ValueError, r"__mul__|mul: .*torch.nn.Linear, unquantized and without hooks")
    hook.remove()
    compiled = torch.compile(model, backend="eager")
    refused(compiled, Exception, "of latents cannot be compiled: call the model itself")
    torch.compiler.reset()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    refused(quantized, ValueError, r"linear_dynamic: .*torch.nn.Linear, unquantized")
