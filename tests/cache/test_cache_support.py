"""Which models a PackedCache serves, and what it says of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

import tokred
from cases.tiny_models import left_padded, tiny_bart, tiny_lm, transformers
from tokred import compat
from tokred.integrations.transformers import attention

LM = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DeepseekV3", {**MLA, "kv_lora_rank": 40}, "layer 0 .*multiple of 16 up to 576.*56.*Dyn"),
        (
            "DeepseekV2",
            {**MLA, "kv_lora_rank": 576},
            "multiple of 16 up to 576.*rotary part is 592",
        ),
        ("Llama", {"head_dim": 512}, "layer 0 of LlamaConfig.*up to 256.*512.*DynamicCache"),
        ("MllamaText", {"head_dim": 16}, "states of images in the same cache, in layers"),
        ("Llama", {"head_dim": 8}, "layer 0 of LlamaConfig.*multiple of 16.*8"),
        ("Llama", {"num_attention_heads": 8}, "layer 0 of LlamaConfig.*keys is 8"),
    ],
)
def test_models_that_are_refused_at_once(name: str, options: dict, message: str) -> None:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**LM, **options})
    with pytest.raises(ValueError, match=message):
        tokred.PackedCache(config)


@torch.no_grad()
def test_a_softcap_of_the_logits() -> None:
    """Keys are packed with their mean, as tanh of logits needs it."""
    options = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 8}
    model = tiny_lm("Gemma2", attn_logit_softcapping=0.5, **options)
    with pytest.raises(ValueError, match=r"softcapping = .*: pass center=False"):
        tokred.PackedCache(model.config, center=True)
    ids, mask = left_padded(2, 40)
    keyword = compat.cache_keyword()
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(attention.register())
    cache = tokred.PackedCache(model.config, 8, window=16)
    for start, stop in ((0, 30), (30, 31), (31, 39), (39, 40)):
        options = {"attention_mask": mask[:, :stop], keyword: cache}
        logits = model(ids[:, start:stop], **options).logits
        real = mask[:, start:stop].bool()
        error = (logits - expected[:, start:stop])[real].norm() / expected[:, start:stop][
            real
        ].norm()
        assert error < (1e-5 if start == 0 else 1e-2)


def test_a_model_in_the_place_of_its_config() -> None:
    model = tiny_lm("Llama", head_dim=16)
    cache = tokred.PackedCache(model, 8, window=32)
    assert cache.options == tokred.PackedCache(model.config, 8, window=32).options
    bloom = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="BloomAttention computes with cached keys in its own"):
        tokred.PackedCache(transformers.BloomForCausalLM(bloom))
    for nothing in ("llama", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="a model of transformers or its config, got"):
            tokred.PackedCache(nothing)
        with pytest.raises(TypeError, match="a model of transformers or its config, got"):
            tokred.DenseCache(nothing)
    assert len(tokred.DenseCache(model).layers) == 2
    deeper = tiny_lm("Llama", head_dim=16, num_hidden_layers=3)
    deeper.set_attn_implementation("tokred")
    with torch.no_grad(), pytest.raises(ValueError, match=r"a model of 2 layers, .* no layer 2"):
        deeper(left_padded()[0], **{compat.cache_keyword(): cache})


def encoder_decoder() -> tuple[nn.Module, dict[str, Any]]:
    model = tiny_bart()
    model.set_attn_implementation(attention.register())
    ids = left_padded(2, 13, 0)[0]
    return model, {"input_ids": ids, "min_new_tokens": 12, "max_new_tokens": 12, "num_beams": 1}


def test_an_encoder_decoder_needs_two_caches() -> None:
    model, inputs = encoder_decoder()
    keyword, config = compat.cache_keyword(), model.config
    expected = model.generate(**inputs)
    both = EncoderDecoderCache(
        tokred.PackedCache(config, 8, window=32), DynamicCache(config=config)
    )
    assert torch.equal(model.generate(**inputs, **{keyword: both}), expected)
    with pytest.raises(ValueError, match=r"EncoderDecoderCache\(tokred.PackedCache\(config\)"):
        model.generate(**inputs, **{keyword: tokred.PackedCache(config)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The rotation leaves keys in float32, beside values in half precision."""
    model = tiny_lm("Llama", head_dim=16)
    model.set_attn_implementation(attention.register())
    ids, mask = left_padded(2, 30)
    keyword, logits = compat.cache_keyword(), []
    caches = DynamicCache(config=model.config), tokred.PackedCache(model.config, 8, window=4)
    for cache in caches:
        steps = []
        with torch.no_grad(), torch.autocast("cpu", dtype):
            for start, stop in ((0, 20), (20, 21), (21, 26), (26, 27)):
                options = {"attention_mask": mask[:, :stop], keyword: cache}
                steps.append(model(ids[:, start:stop], **options).logits.float())
        with torch.no_grad():
            options = {"attention_mask": mask[:, :28], keyword: cache}
            steps.append(model(ids[:, 27:28], **options).logits)
        logits.append(torch.cat(steps, 1)[mask[:, :28].bool()])
    assert (logits[1] - logits[0]).norm() < 0.1 * logits[0].norm()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tidal_decode", dict(sparse_layer_start=0), "token_select or top_k_attention"),
        ("fasa", dict(dims=[torch.arange(4, dtype=torch.int32).repeat(9, 1)] * 2), "DynamicCache"),
        ("token_select", dict(rotation="compact"), "rotation='cached'"),
    ],
)
def test_methods_that_need_dense_keys_say_so_at_the_first_token(
    name: str, options: dict, message: str
) -> None:
    model = tiny_lm("Llama", head_dim=16)
    cache = tokred.PackedCache(model.config)
    inputs = {"input_ids": left_padded()[0][:, :1], compat.cache_keyword(): cache}
    with tokred.patch(model, name, **options), pytest.raises(ValueError, match=message):
        model(**inputs)


def test_a_bias_of_the_keys_costs_no_bits() -> None:
    """A large constant in a few slow channels, which groups along channels would be spent on."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, rope_theta=1e6,
        )
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    model.model.layers[0].self_attn.k_proj.bias.data[[25, 28, 57, 60]] = 60.0
    model.set_attn_implementation(attention.register())
    ids = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(1))
    keyword = compat.cache_keyword()

    def logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(ids[:, :110], **{keyword: cache})
            steps = [model(ids[:, t, None], **{keyword: cache}).logits for t in range(110, 120)]
        return torch.cat(steps, 1).double().log_softmax(-1)

    dense = logits(DynamicCache(config=model.config))
    divergence = {}
    for name, form in (
        ("4", {}), ("4, not centred", {"center": False}), ("2", {"bits": 2}), ("8", {"bits": 8})
    ):  # fmt: skip
        packed = logits(tokred.PackedCache(model.config, **form))
        divergence[name] = (dense.exp() * (dense - packed)).sum(-1).mean().item()
    assert divergence["8"] < divergence["4"] < divergence["2"]
    assert 4 * divergence["4"] < divergence["4, not centred"]
