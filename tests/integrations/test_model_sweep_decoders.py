"""Every family of decoders: a method that chooses all keys changes nothing, or one clear error.

The models are as small as their families allow. What is asked of each: with every key chosen, the
logits are those of tokred's dense attention bit for bit, and those of eager attention to rounding,
and so is the text; a few keys run; and the model is left as it was found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from bench import decoder_families, model_families
from cases.tiny_models import evictors, generated, left_padded, selectors, transformers
from tokred import compat
from tokred.integrations.transformers import attention
from tokred.integrations.transformers.full_attention import full_attention

pytestmark = pytest.mark.usefixtures("one_thread")

SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
HYBRID = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 6}
BASE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
GROUPED = {**BASE, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
LATENT = dict(
    **BASE, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_group=1,
    num_experts_per_tok=2, topk_group=1, n_shared_experts=1, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
INDEXED = dict(**LATENT, index_topk=4, index_n_heads=2, index_head_dim=16)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_conv_kernel_dim=4, shared_expert_intermediate_size=32,
)  # fmt: skip
SHARED = dict(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97)
CHUNKS = dict(
    num_hidden_layers=4, layer_types=[CHUNKED, FULL] * 2, attention_chunk_size=6,
    num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48,
    no_rope_layers=[1, 0, 1, 0], moe_layers=[1],
)  # fmt: skip
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64)


@dataclass(frozen=True)
class Family:
    """A model of transformers and what is expected of it.

    layers: the model's numbers of its full-attention layers.
    compact: what the refusal of rotation "compact" says; None where the model has it.
    whole: what the refusal of methods that keep fewer keys says; None where they work.
    """

    name: str
    options: dict[str, Any]
    layers: list[int] = field(default_factory=lambda: [0, 1])
    compact: str | None = None
    whole: str | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        special = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config = getattr(transformers, f"{self.name}Config")(**special, **self.options)
        head = "LMHeadModel" if self.name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, self.name.removesuffix("Text") + head)(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3)
        model.set_attn_implementation("eager")
        return model


NO_ROTATION, HALVES, LAYERED = "no rotary embedding", "two halves", "differs from layer to layer"
PARTIAL = "cannot leave its keys without rotation"
FAMILIES = (
    Family("Llama", HEADS),
    Family("Mistral", {**HEADS, "sliding_window": None}),
    Family("Qwen2", {**GROUPED, "use_sliding_window": True, "sliding_window": 6,
                     "max_window_layers": 1}, layers=[0]),
    Family("Qwen3Moe", {**HEADS, **EXPERTS}),
    Family("Qwen3Next", {**HEADS, **EXPERTS, **LINEAR, "num_hidden_layers": 4}, layers=[3]),
    Family("Gemma", HEADS),
    Family("Gemma2", {**HEADS, "sliding_window": 6, "attn_logit_softcapping": 0.2}, layers=[1]),
    Family("Gemma3Text", {**HEADS, **HYBRID}, layers=[1, 3], compact=LAYERED),
    Family("Gemma4Text", {**HEADS, **HYBRID, **SHARED, "num_global_key_value_heads": 2,
                          "global_head_dim": 16}, layers=[1, 3], compact=LAYERED,
           whole="shares its keys"),
    Family("GptOss", {**HEADS, "sliding_window": 6, "num_local_experts": 4,
                      "num_experts_per_tok": 2}, layers=[1], compact=HALVES, whole="sinks"),
    Family("Llama4Text", {**HEADS, **CHUNKS}, layers=[1, 3], compact=NO_ROTATION),
    Family("Cohere2", {**HEADS, **HYBRID}, layers=[1, 3], compact=HALVES),
    Family("DeepseekV3", LATENT, compact=PARTIAL, whole="latent attention"),
    Family("Phi", BASE, compact=PARTIAL),
    Family("Phi3", {**GROUPED, "sliding_window": None}),
    Family("GPT2", GPT, compact=NO_ROTATION),
    *([Family("GPTJ", {**GPT, "rotary_dim": 4}, compact=NO_ROTATION)]
      if compat.release("transformers") >= (5, 24) else []),  # before, not through the interface
    Family("GPTNeoX", BASE),
    Family("OPT", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                       word_embed_proj_dim=32), compact=NO_ROTATION),
    Family("Lfm2", {**GROUPED, "layer_types": ["conv", FULL]}, layers=[1]),
    Family("Olmo2", GROUPED),
    Family("SmolLM3", {**HEADS, "no_rope_layers": [1, 0]}, compact="layer 1 does not rotate"),
    Family("Exaone4", {**HEADS, "sliding_window": 6, "layer_types": [SLIDING, FULL]}, layers=[1],
           compact="layer 1 does not rotate"),
    Family("StableLm", GROUPED, compact=PARTIAL),
    Family("Granite", GROUPED),
    Family("Jamba", {**GROUPED, "num_hidden_layers": 4, "attn_layer_period": 2,
                     "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
                     "mamba_d_conv": 2}, layers=[1, 3], compact=NO_ROTATION),
    Family("Bart", dict(d_model=32, decoder_layers=2, decoder_attention_heads=4,
                        decoder_ffn_dim=48, encoder_layers=2), compact=NO_ROTATION),
)  # fmt: skip
WINDOW = {**GROUPED, "sliding_window": 6}
REFUSED = (
    (Family("Mistral", WINDOW), "has a sliding window of 6"),
    (Family("Mixtral", {**WINDOW, "num_local_experts": 4}), "has a sliding window of 6"),
    (Family("Phi3", WINDOW), "has a sliding window of 6"),
    (Family("Starcoder2", WINDOW), "has a sliding window of 6"),
    (Family("Olmoe", {**WINDOW, "num_experts": 4, "num_experts_per_tok": 2}), "window of 6"),
    (Family("DeepseekV32", INDEXED), "brings lists of keys"),
    (Family("GlmMoeDsa", INDEXED), "brings lists of keys"),
    (Family("Falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
     "does not call transformers' attention interface"),
    (Family("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
     "BloomAttention does not call transformers' attention interface"),
    (Family("Mamba", dict(hidden_size=32, num_hidden_layers=2)), "it has no attention"),
    (Family("Llama", {**HEADS, "head_dim": 512}), "has heads of 512 dimensions, above 256"),
)  # fmt: skip


def attributes(model: nn.Module) -> list[Any]:
    """Everything that a patch may set in the model."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    return [*forwards, *(dict(vars(config)) for config in configs.values())]


def logits(model: nn.Module, **options: Any) -> Tensor:
    ids, mask = left_padded()
    return model(ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_choosing_every_key_changes_nothing(family: Family) -> None:
    model = family.model()
    ids, mask = left_padded()
    real = mask.bool()
    before = attributes(model)
    assert [m.layer_idx for m in full_attention(model).values()] == family.layers
    eager, text = logits(model)[real], generated(model, ids, None)
    model.set_attn_implementation(attention.register())
    dense = logits(model)
    torch.testing.assert_close(dense[real], eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, logits_to_keep=3), dense[:, -3:])
    model.set_attn_implementation("eager")
    for name, options in selectors(len(family.layers), 4, 99).items():
        with tokred.patch(model, name, **options):
            assert torch.equal(logits(model), dense), name
            assert torch.equal(generated(model, ids, None), text), name
        assert attributes(model) == before, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_a_few_keys_and_an_exception(family: Family) -> None:
    model = family.model()
    ids, _ = left_padded()
    before = attributes(model)
    for name, options in selectors(len(family.layers), 4, 2).items():
        with pytest.raises(KeyError, match="inside"), tokred.patch(model, name, **options):
            whole = logits(model)
            torch.testing.assert_close(logits(model, logits_to_keep=3), whole[:, -3:])
            assert generated(model, ids, None, min_new_tokens=5).shape == (2, 18)
            raise KeyError("inside")
        assert attributes(model) == before, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_keeping_fewer_keys(family: Family) -> None:
    """One of the methods on each family: with room for everything, and for three tokens."""
    model = family.model()
    ids, mask = left_padded()
    before = attributes(model)
    if family.whole is not None:
        for name in evictors(99):
            with pytest.raises(ValueError, match=family.whole):
                tokred.patch(model, name)
        return
    name = sorted(evictors(99))[FAMILIES.index(family) % len(evictors(99))]
    if name == "expected_attention" and family.compact is not None:
        with pytest.raises(ValueError, match=family.compact):
            tokred.patch(model, name)
        name = "h2o"
    text = generated(model, ids, mask)
    with tokred.patch(model, name, **evictors(99)[name]):
        assert torch.equal(generated(model, ids, mask), text), name
    with tokred.patch(model, name, **evictors(3)[name]):
        found = generated(model, ids, mask, min_new_tokens=5, return_dict_in_generate=True)
        layer = found.past_key_values.layers[family.layers[-1]]
        assert found.sequences.shape == (2, 18) and layer.length == 17
        assert layer.keys.shape[2] < 17, name
    assert attributes(model) == before, name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_compact_rotation(family: Family) -> None:
    model = family.model()
    before = attributes(model)
    if family.compact is not None:
        with pytest.raises(ValueError, match=family.compact):
            tokred.patch(model, "token_select", rotation="compact")
    else:
        ids, mask = left_padded()
        text = generated(model, ids, mask)
        with tokred.patch(model, "token_select", k=99, rotation="compact"):
            assert torch.equal(generated(model, ids, mask), text)
    assert attributes(model) == before


@pytest.mark.parametrize(("family", "message"), REFUSED, ids=lambda case: getattr(case, "name", ""))
def test_what_cannot_be_served_is_refused_at_once(family: Family, message: str) -> None:
    model = family.model()
    before = attributes(model)
    for name, options in selectors(2, 4, 99).items():
        with pytest.raises(ValueError, match=message):
            tokred.patch(model, name, **options)
    assert attributes(model) == before


def test_encoder_decoders_attend_through_the_method_in_their_decoder_alone() -> None:
    sizes = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                 decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                 decoder_start_token_id=1)  # fmt: skip
    config = transformers.BartConfig(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                     **sizes)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    assert [name for name in full_attention(model)] == [
        f"model.decoder.layers.{layer}.self_attn" for layer in (0, 1)
    ]
    ids, mask = left_padded()
    text = generated(model, ids, mask)
    for name, options in selectors(2, 4, 99).items():
        with tokred.patch(model, name, **options):
            assert torch.equal(generated(model, ids, mask), text)
    relative = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                                     num_heads=4)  # fmt: skip
    with pytest.raises(ValueError, match="adds a position bias"):
        tokred.patch(transformers.T5ForConditionalGeneration(relative), "token_select")


@torch.no_grad()
def test_whisper_listens_as_before() -> None:
    """Its decoder chooses among its own tokens; the sounds are attended to by other modules."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=64, num_mel_bins=8, max_source_positions=32,
        max_target_positions=64, suppress_tokens=None, begin_suppress_tokens=None, **special,
        **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation("eager")
    sounds = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    text = model.generate(sounds, **options)
    for name, chosen in selectors(2, 4, 99).items():
        with tokred.patch(model, name, **chosen):
            assert torch.equal(model.generate(sounds, **options), text), name
    model.set_attn_implementation("tokred")
    own = tokred.PackedCache(model, 8, window=64, rotate=False)
    both = transformers.EncoderDecoderCache(own, transformers.DynamicCache(config=config))
    packed = model.generate(sounds, **options, **{compat.cache_keyword(): both})
    assert torch.equal(packed, text)


@pytest.mark.wide
@pytest.mark.parametrize("family", decoder_families.SECTION.families, ids=lambda each: each.model)
def test_the_page_says_what_a_family_does(family: model_families.Family) -> None:
    """`python -m bench.model_families decoder_families` writes the page."""
    if compat.release("transformers") != (5, 24):
        pytest.skip("the page is that of transformers 5.24")
    found = model_families.row(family, decoder_families.examine(family))
    assert model_families.written(family) == found
