"""transformers' models on tokred's attention: every cache, padding, lists of keys, and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.compat import cache_keyword
from tokred.integrations.transformers import attention

CACHE = cache_keyword()
MODELS = {
    "llama": lambda: tiny_lm("Llama"),
    "qwen3": lambda: tiny_lm("Qwen3"),
    "mistral": lambda: tiny_lm("Mistral", sliding_window=6),
    "gemma3": lambda: tiny_lm(
        "Gemma3Text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss": lambda: tiny_lm(
        "GptOss", sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek": lambda: tiny_lm("DeepseekV32"),
    "glm-dsa": lambda: tiny_lm("GlmMoeDsa"),
}


@pytest.fixture(autouse=True)
def registered(one_thread: None) -> None:
    assert attention.register() == "tokred"


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def logits(model: nn.Module, implementation: str, *args: Any, **kwargs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(*args, **kwargs).logits


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_eager(model: nn.Module, padded: bool) -> None:
    ids, mask = left_padded()
    mask = mask if padded else None
    expected = logits(model, "eager", ids, attention_mask=mask)
    actual = logits(model, "tokred", ids, attention_mask=mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_that_of_eager(model: nn.Module, padded: bool, cache: str | None) -> None:
    ids, mask = left_padded()
    mask = mask if padded else None
    results = []
    for implementation in ("eager", "tokred"):
        model.set_attn_implementation(implementation)
        results.append(generated(model, ids, mask, cache_implementation=cache))
    assert torch.equal(*results)


@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_two_parts(model: nn.Module, static: bool) -> None:
    ids, mask = left_padded()
    results = []
    for implementation in ("eager", "tokred"):
        if static:
            cache = transformers.StaticCache(model.config, max_cache_len=20)
        else:
            cache = transformers.DynamicCache(config=model.config)
        options = {CACHE: cache}
        first = logits(model, implementation, ids[:, :5], attention_mask=mask[:, :5], **options)
        second = logits(model, implementation, ids[:, 5:], attention_mask=mask, **options)
        results.append(torch.cat([first, second], 1)[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_prefill_with_padding_makes_no_square_mask() -> None:
    _, mask = left_padded()
    seen = []

    def record(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[3])
        return attention.attention_forward(module, *args, **kwargs)

    transformers.AttentionInterface.register("tokred", record)
    model = MODELS["llama"]()
    ids, _ = left_padded()
    logits(model, "tokred", ids, attention_mask=mask)
    assert all(m.shape == (2, 1, 1, 13) for m in seen) and len(seen) == 2
    seen.clear()
    logits(model, "tokred", ids, attention_mask=torch.ones_like(mask))
    assert seen == [None, None]
    both_ways = attention.attention_mask(
        2, 13, 13, mask_function=attention.bidirectional_mask_function, attention_mask=mask.bool()
    )
    assert both_ways.shape == (2, 1, 13, 13) and both_ways.stride(2) == 0


def test_an_encoder_with_padding() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids, mask = left_padded()
    results = []
    for implementation in ("eager", "tokred"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_no_mask_says_that_the_queries_are_the_last_of_the_keys() -> None:
    """In a static cache, whose last keys do not exist yet, the mask says how many there are."""
    made = attention.attention_mask
    for length, offset, filled in ((5, 0, 5), (5, 8, 13), (1, 12, 13)):
        assert made(2, length, filled, offset) is None
        static = made(2, length, 16, offset)
        assert static.shape[3] in (filled, 16) and static[0, 0, -1].sum() == filled
    padding = torch.ones(2, 13, dtype=torch.bool)
    padding[1, :2] = False
    assert torch.equal(made(2, 5, 13, 8, attention_mask=padding)[:, 0, 0], padding)
    both_ways = SimpleNamespace(is_causal=False)
    rule = attention.bidirectional_mask_function
    assert made(2, 5, 5, mask_function=rule, config=both_ways).shape == (1, 1, 5, 5)


@pytest.mark.parametrize("queries", [1, 3])
def test_fewer_queries_than_keys_see_all_keys_before_them(queries: int) -> None:
    q, k, v = heads(queries, 9)
    causal = torch.ones(queries, 9).tril(9 - queries).bool()
    expected = tokred.biased_attention(q, k, v, mask=causal[None, None])[0].transpose(1, 2)
    out, _ = attention.attention_forward(module_of(), q, k, v, None)
    torch.testing.assert_close(out, expected)
    # Five more places of a static cache, behind a mask that ends before them.
    longer = [torch.cat([x, torch.full_like(x[:, :, :5], torch.nan)], 2) for x in (k, v)]
    padding = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    out, _ = attention.attention_forward(module_of(), q, *longer, padding)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="11 queries cannot be the last of 9 keys"):
        attention.attention_forward(module_of(), heads(11, 9)[0], k, v, None)


def module_of(**attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"is_causal": True, "layer_idx": 0, **attributes})


def heads(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = generator(0)
    return tuple(
        torch.randn(2, count, length, 8, generator=draw)
        for count, length in ((4, queries), (2, keys), (2, keys))
    )


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 9), (1, 9), (2, 3)])
def test_a_sliding_window_without_a_mask(queries: int, keys: int) -> None:
    q, k, v = heads(queries, keys)
    rule = sliding_window_causal_mask_function(4)
    full = sdpa_mask(2, queries, keys, keys - queries, mask_function=rule,
                     allow_is_causal_skip=False)  # fmt: skip
    expected = tokred.biased_attention(q, k, v, mask=full)[0].transpose(1, 2)
    padding = None if queries in (1, keys) else torch.ones(1, 1, 1, keys, dtype=torch.bool)
    out, _ = attention.attention_forward(module_of(), q, k, v, padding, sliding_window=4)
    torch.testing.assert_close(out, expected)


def test_attention_sinks_join_the_softmax() -> None:
    q, k, v = heads(5, 5)
    sinks = torch.randn(4, generator=generator(3))
    out, _ = attention.attention_forward(module_of(), q, k, v, None, s_aux=sinks)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 5, 1)], -1)
    weights = scores.softmax(-1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_lists_of_keys_obey_the_mask_and_causality() -> None:
    q, k, v = heads(6, 6)
    indices = torch.randint(-1, 7, (2, 6, 4), generator=generator(4), dtype=torch.int32)
    listed = torch.zeros(2, 6, 7).scatter_add(
        2, torch.where((indices >= 0) & (indices < 6), indices, 6).long(), torch.ones(2, 6, 4)
    )[..., :6]
    causal = torch.ones(6, 6).tril().bool()
    padding = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    padding[1, ..., :2] = False
    for mask, visible in ((None, causal), (padding, causal & padding)):
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        # An index that is listed twice counts twice.
        scores = (scores + listed.log()[:, None]).masked_fill(~visible, -torch.inf)
        expected = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
        out, _ = attention.attention_forward(module_of(), q, k, v, mask, indices=indices)
        torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_indices": torch.zeros(1)}, "lists of blocks"),
        ({"cache": object()}, "paged caches"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "packed sequences"),
        ({"output_attentions": True}, "attention weights"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_the_kernels_lack_is_refused(options: dict, message: str) -> None:
    q, k, v = heads(5, 5)
    with pytest.raises(ValueError, match=message):
        attention.attention_forward(module_of(), q, k, v, None, **options)
    nothing = dict.fromkeys(options, 0.0 if "dropout" in options else None)
    attention.attention_forward(module_of(), q, k, v, None, **nothing)


def test_masks_of_integers_are_refused() -> None:
    q, k, v = heads(5, 5)
    with pytest.raises(ValueError, match=r"attention_mask must be .*, bool, .* got torch.int64"):
        attention.attention_forward(module_of(), q, k, v, torch.zeros(2, 1, 5, 5).long())


def test_training_runs_and_gives_the_gradients_of_sdpa() -> None:
    model = MODELS["llama"]()
    ids, mask = left_padded()
    grads = []
    for implementation in ("eager", "tokred"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, attention_mask=mask).logits[mask.bool()].square().mean().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


# A method in the model.


class Recorded:
    """A method that attends densely and keeps what it was asked."""

    adapters = ("causal_lm",)
    rotation = "cached"

    def __init__(self) -> None:
        self.asked: list[attention.AttentionCall] = []

    def attention(self, layers: Sequence[int]) -> Recorded:
        self.layers = list(layers)
        return self

    def attend(self, call: attention.AttentionCall) -> tuple[Tensor, Tensor]:
        self.asked.append(call)
        return call.dense()


def patched(model: nn.Module, method: Any) -> Any:
    return tokred.patching.Patch(model, method, tokred.patching.Settings())


def test_a_method_is_asked_once_a_layer() -> None:
    model, method = MODELS["llama"](), Recorded()
    ids, mask = left_padded()
    expected = logits(model, "tokred", ids, attention_mask=mask)
    model.set_attn_implementation("sdpa")
    with patched(model, method) as handle, torch.no_grad():
        assert_bitwise_equal(model(ids, attention_mask=mask).logits, expected)
        assert handle.states == [method]
    assert method.layers == [0, 1]
    assert [call.layer for call in method.asked] == [0, 1]
    call = method.asked[0]
    assert call.q.shape == (2, 9, 13, 8) and call.k.shape == (2, 3, 13, 8) and call.causal
    assert torch.equal(call.visible(), mask.bool())
    assert torch.equal(call.num_visible(), mask.cumsum(1))
    with pytest.raises(RuntimeError, match="this one works in a language model"):
        handle.counts  # noqa: B018


@pytest.mark.parametrize("queries", [1, 5])
def test_compact_rotation_is_undone_exactly(queries: int) -> None:
    """A dense method over unrotated keys gives the model's own logits, bit for bit."""
    method = Recorded()
    method.rotation = "compact"
    model = MODELS["qwen3"]()
    ids, mask = left_padded()
    expected = generated(model, ids, mask)
    model.set_attn_implementation("tokred")
    results = []
    for compact in (False, True):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            context = patched(model, method) if compact else torch.no_grad()
            with context:
                places = (mask.cumsum(1) - 1).clamp(min=0)
                model(ids[:, :-queries], attention_mask=mask[:, :-queries],
                      position_ids=places[:, :-queries], **{CACHE: cache})  # fmt: skip
                results.append(
                    model(ids[:, -queries:], attention_mask=mask,
                          position_ids=places[:, -queries:], **{CACHE: cache}).logits
                )  # fmt: skip
    assert_bitwise_equal(results[1], results[0])
    with patched(model, method):
        assert torch.equal(generated(model, ids, mask), expected)


def test_layers_of_hybrid_models_are_counted_among_those_with_full_attention() -> None:
    method = Recorded()
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny_lm("Gemma3Text", sliding_window=6, num_hidden_layers=4, layer_types=kinds)
    with patched(model, method), torch.no_grad():
        model(left_padded()[0])
    assert method.layers == [1, 3]
    assert [call.layer for call in method.asked] == [0, 1]
    # A second decoder that shares the config has layers of its own.
    method.asked.clear()
    two = nn.ModuleList([tiny_lm("Llama"), tiny_lm("Llama")])
    two[1].config = two[1].model.config = two[0].config
    for layer in two[1].model.layers:
        layer.self_attn.config = two[0].config
    with patched(two, method) as handle, torch.no_grad():
        assert len(handle.states) == 2
        for model in two:
            model(left_padded()[0])
    assert [call.layer for call in method.asked] == [0, 1, 0, 1]


def test_a_changed_implementation_is_noticed_and_undone() -> None:
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    ids, _ = left_padded()
    noticed = pytest.warns(RuntimeWarning, match="_attn_implementation_internal changed")
    with noticed, patched(model, Recorded()):
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="did not hand its attention to tokred"):
            model(ids)
    assert model.config._attn_implementation == "eager"
    assert all("forward" not in m.__dict__ for m in model.modules())
    model(ids)


@torch.no_grad()
def test_prompts_that_see_later_tokens() -> None:
    """The modules say that they are not causal; masks say what is, as in PaliGemma."""
    model = tiny_lm("Gemma", use_bidirectional_attention=True)
    ids, mask = left_padded()
    prefix = (torch.arange(13) < 8)[None, None, None] | torch.ones(13, 13).tril().bool()
    prefix = prefix & mask.bool()[:, None, None]
    for given in (mask, torch.ones_like(mask), prefix):
        real = mask.bool() if given is not prefix else prefix.any(-1)[:, 0]
        expected = logits(model, "eager", ids, attention_mask=given)[real]
        dense = logits(model, "tokred", ids, attention_mask=given)
        if given is prefix:  # eager attention would add the bool mask to its logits
            expected = logits(model, "sdpa", ids, attention_mask=given)[real]
        torch.testing.assert_close(dense[real], expected, rtol=1e-4, atol=1e-4)
        with patched(model, Recorded()):
            assert_bitwise_equal(model(ids, attention_mask=given).logits, dense)
    with pytest.raises(ValueError, match=r"a prompt see later ones.*rotation='cached'"):
        tokred.patch(model, "token_select", rotation="compact")
    # An encoder of the same kind generates nothing, so there is no key to choose.
    with pytest.raises(ValueError, match="GemmaAttention is not causal"):
        tokred.patch(model.model, "token_select")


def test_models_that_would_misread_a_mask_are_refused() -> None:
    config = transformers.BigBirdPegasusConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        attention_type="original_full", max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BigBirdPegasusForConditionalGeneration(config).eval()
    ids, mask = left_padded()
    with pytest.raises(ValueError, match="bigbird_pegasus does not leave all of its attention"):
        logits(model, "tokred", ids, attention_mask=mask, decoder_input_ids=ids)


def test_a_patched_model_is_moved_but_not_copied() -> None:
    model = MODELS["llama"]()
    ids, _ = left_padded()
    expected = logits(model, "tokred", ids)
    with tokred.patch(model, "token_select", k=99):
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="leave the patch first"):
                make(model)
        # Layers of another kind, as quantisation puts them in, belong to the model, not the patch.
        wider = model.double().model.layers[0].self_attn.q_proj
        model.model.layers[0].self_attn.q_proj = nn.Sequential(wider)
        torch.testing.assert_close(model(ids).logits.float(), expected, rtol=1e-4, atol=1e-4)
        assert_bitwise_equal(model.float()(ids).logits, expected)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert_bitwise_equal(copy.deepcopy(model)(ids).logits, expected)


@torch.no_grad()
def test_hooks_that_move_parts_of_a_model() -> None:
    """As accelerate puts them into a model that is spread over devices."""
    accelerate = pytest.importorskip("accelerate")
    model = MODELS["llama"]()
    ids, mask = left_padded()
    expected = logits(model, "tokred", ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    accelerate.dispatch_model(model, {"model.embed_tokens": "cpu", "": "cpu"}, force_hooks=True)
    hooked = [module.__dict__.get("forward") for module in model.modules()]
    assert any(hooked)
    with tokred.patch(model, "token_select", k=99):
        assert_bitwise_equal(model(ids, attention_mask=mask).logits, expected)
        generated(model, ids, mask)
    assert [module.__dict__.get("forward") for module in model.modules()] == hooked


def test_unsuitable_models_are_refused() -> None:
    for model, reason in (
        (tiny_lm("Gemma3Text", num_hidden_layers=2), "is sliding_attention"),
        (tiny_lm("Mistral", sliding_window=6), "has a sliding window of 6"),
        (MODELS["deepseek"](), "brings lists of keys"),
    ):
        with pytest.raises(ValueError, match=f"no layer that .*{reason}"):
            patched(model, Recorded())
    compact = Recorded()
    compact.rotation = "compact"
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="changes with the length"):
        patched(tiny_lm("Llama", rope_parameters=scaling), compact)
    with pytest.raises(ValueError, match="two halves"):
        patched(tiny_lm("Cohere"), compact)
    with pytest.raises(ValueError, match="differs from layer to layer"):
        patched(MODELS["gemma3"](), compact)
    with pytest.raises(ValueError, match="rotation='cached'"):
        patched(tiny_lm("DeepseekV3"), compact)
    with pytest.raises(ValueError, match="layer 1 does not rotate"):
        patched(tiny_lm("SmolLM3", no_rope_layers=[1, 0], pad_token_id=0), compact)
    with pytest.raises(ValueError, match="merge tokens"):
        tokred.patch(MODELS["llama"](), "token_select", trace_source=True)
