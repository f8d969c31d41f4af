"""Models whose caches keep fewer keys, beside attention to all keys under masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import tokred
from cases.compare import assert_bitwise_equal
from cases.eviction import Row, Rule, Step, keep_best, kept_places
from cases.inputs import generator
from cases.tiny_models import evictors, generated, left_padded, tiny_lm, transformers
from cases.tiny_vlms import FAMILIES as VLMS
from tokred.compat import cache_keyword
from tokred.integrations.transformers import PressAdapter, attention
from tokred.integrations.transformers.kept_keys import KeptKeysLayer
from tokred.methods.h2o import H2oOptions

SLIDING = ["sliding_attention", "full_attention"]


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny_lm("Llama")


def dynamic(model: nn.Module) -> transformers.DynamicCache:
    return transformers.DynamicCache(config=model.config)


PARTS = (20, 1, 1, 5, 1, 1)


def in_parts(model: nn.Module, ids: Tensor, mask: Tensor, cache: Any, parts: Any = PARTS) -> Tensor:
    """The logits of forward passes of so many tokens."""
    found, start = [], 0
    for count in parts:
        stop = start + count
        found.append(
            model(ids[:, start:stop], attention_mask=mask[:, :stop],
                  position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                  **{cache_keyword(): cache}).logits
        )  # fmt: skip
        start = stop
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", [f for f in VLMS if f.name in ("qwen2_5_vl", "paligemma")],
                         ids=lambda family: family.name)  # fmt: skip
@torch.no_grad()
def test_vision_language_models_keep_fewer_keys(family: Any) -> None:
    """Positions of several dimensions, and a prompt that sees later tokens."""
    model, inputs = family.model(), family.prompt((1, 2))
    options = {"max_new_tokens": 4, "do_sample": False}
    text = model.generate(**inputs, **options)
    with tokred.patch(model, "h2o", budget=300):
        assert torch.equal(model.generate(**inputs, **options), text)
    with tokred.patch(model, "h2o", budget=9):
        found = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert found.sequences.shape == text.shape
    assert {layer.keys.shape[2] for layer in found.past_key_values.layers} == {9}
    if family.name == "qwen2_5_vl":
        with pytest.raises(ValueError, match="M-RoPE"):
            tokred.patch(model, "expected_attention")


def heavy(budget: int) -> Rule:
    def rule(step: Step) -> Tensor:
        total = step.grouped(step.p.sum(1))
        if "total" in step.memory:
            total = total + pad(step.memory["total"], (0, step.p.shape[1]))
        step.memory["total"] = total
        scores = total.clone()
        scores[:, -(budget - budget // 2) :] = torch.inf
        return keep_best(scores, step.alive, budget)

    return rule


class Transcribed:
    """An attention of transformers that keeps all keys and hides those that a rule drops."""

    def __init__(self, rule: Rule, padding: list[int]) -> None:
        self.rule, self.padding = rule, padding
        self.rows: dict[int, list[Row]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
        scaling: float, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        new, total = query.shape[2], key.shape[2]
        query = query * (scaling * query.shape[3] ** 0.5)
        if total == new:
            heads, dim = key.shape[1], key.shape[3]
            empty, alive = torch.zeros(heads, 0, dim).double(), torch.zeros(heads, 0).bool()
            state = (empty, empty, alive, options.get("softcap"))
            self.rows[module.layer_idx] = [Row(self.rule, *state) for _ in query]
        out = torch.zeros_like(query)
        for number, row in enumerate(self.rows[module.layer_idx]):
            skip = self.padding[number] if total == new else 0
            states = (query[number], key[number, :, total - new :], value[number, :, total - new :])
            out[number, :, skip:] = row.step(*(x[:, skip:] for x in states)).to(out.dtype)
        return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("kind", ["Gemma3Text", "Gemma2"])
@torch.no_grad()
def test_a_model_sees_what_is_left(kind: str) -> None:
    """Masks, positions and left padding, over decoding and a second prompt; a sliding layer is as
    it was. Gemma 2 caps its logits."""
    options = dict(sliding_window=6, layer_types=SLIDING * 2, num_hidden_layers=4)
    if kind == "Gemma2":
        options["attn_logit_softcapping"] = 0.5
    model = tiny_lm(kind, **options)
    ids, mask = left_padded(2, sum(PARTS), 6)
    rule = Transcribed(heavy(9), [0, 6])
    sliding = transformers.AttentionInterface()[attention.register()]  # with a softcap, too

    def transcribed(module: nn.Module, *states: Any, **options: Any) -> tuple[Tensor, None]:
        return (sliding if module.sliding_window else rule)(module, *states, **options)

    AttentionInterface.register("transcribed", transcribed)
    AttentionMaskInterface.register("transcribed", sdpa_mask)
    model.set_attn_implementation("transcribed")
    expected = in_parts(model, ids, mask, dynamic(model))
    dense = tiny_lm(kind, **options)
    dense.set_attn_implementation("eager")
    with tokred.patch(dense, "h2o", budget=9):
        cache = dynamic(dense)
        actual = in_parts(dense, ids, mask, cache)
        assert cache.get_seq_length() == sum(PARTS)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=2e-3, atol=2e-3)
    plain = in_parts(dense, ids, mask, dynamic(dense))
    assert (plain - actual).abs().max() > 0.1
    for layer in (1, 3):
        for number, skip in ((0, 0), (1, 6)):
            alive = rule.rows[layer][number].alive
            places = [head.nonzero()[:, 0].tolist() for head in alive]
            assert kept_places(cache.layers[layer], number, skip) == places


@pytest.mark.parametrize("name", evictors(99))
@torch.no_grad()
def test_a_budget_for_everything_changes_nothing(llama: nn.Module, name: str) -> None:
    """Bit for bit: decoding, left padding, beams, a prompt in parts, in any cache that grows."""
    ids, mask = left_padded()
    logits = {"output_logits": True, "return_dict_in_generate": True}
    llama.set_attn_implementation(attention.register())
    expected = generated(llama, ids, mask, **logits).logits
    others = [{"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 4}]
    texts = [generated(llama, ids, mask, **options) for options in others]
    llama.set_attn_implementation("sdpa")
    with tokred.patch(llama, name, **evictors(99)[name]):
        for cache in (None, dynamic(llama), tokred.DenseCache(llama.config)):
            given = {} if cache is None else {cache_keyword(): cache}
            for ours, dense in zip(
                generated(llama, ids, mask, **logits, **given).logits, expected, strict=True
            ):
                assert_bitwise_equal(ours, dense, "logits")
        for options, text in zip(others, texts, strict=True):
            assert torch.equal(generated(llama, ids, mask, **options), text)


@pytest.mark.parametrize("name", evictors(5))
@torch.no_grad()
def test_generation_stays_within_the_budget(llama: nn.Module, name: str) -> None:
    """A greedy beam is greedy decoding, rows are those of themselves alone, and chats go on."""
    ids, mask = left_padded(2, 30, 8)
    options = evictors(5)[name]
    with tokred.patch(llama, name, **options):
        with torch.inference_mode():  # the chat goes on without
            state = generated(llama, ids, mask, return_dict_in_generate=True)
        held = [layer.keys.shape[2] for layer in state.past_key_values.layers]
        grows = name in ("snap_kv", "pyramid_kv", "expected_attention", "ada_kv", "ems")
        assert (
            max(held) <= (30 if name == "ada_kv" else 9 if name == "pyramid_kv" else 5) + 4 * grows
        )
        assert state.past_key_values.get_seq_length() == 34
        alone = generated(llama, ids[:1], None)
        if name != "ada_kv":
            assert torch.equal(state.sequences[:1], alone)
        beams = generated(llama, ids, mask, num_beams=3, num_return_sequences=3)
        assert beams.shape == (6, 35)
        turn = torch.cat([state.sequences, ids[:, :6]], 1)
        longer = torch.cat([mask, torch.ones(2, 11, dtype=mask.dtype)], 1)
        cache = state.past_key_values
        assert generated(llama, turn, longer, **{cache_keyword(): cache}).shape == (2, 46)


def test_rows_follow_beams() -> None:
    """A reordered cache goes on as one that was filled in that order."""
    order = torch.tensor([2, 0, 2, 1])

    def passes(rows: Tensor | None, cache: KeptKeysLayer, seeds: range) -> Tensor:
        for seed in seeds:
            draw = generator(seed)
            count = 20 if seed == 0 else 1
            q = torch.randn(3, 4, count, 16, generator=draw)
            k, v = (torch.randn(3, 2, count, 16, generator=draw) for _ in range(2))
            mask = torch.ones(3, 1, 1, cache.length + count, dtype=torch.bool)
            mask[1, ..., :7] = False
            if rows is not None:
                q, k, v, mask = (x[rows] for x in (q, k, v, mask))
            states, _ = cache.update(k, v)
            out, _ = states.attend(q, mask, None)
        return out

    for options in (H2oOptions(budget=6), H2oOptions(budget=60)):
        actual, expected = (KeptKeysLayer(options, 0, 1) for _ in range(2))
        passes(None, actual, range(4))
        actual.reorder_cache(order)
        passes(order, expected, range(4))
        assert_bitwise_equal(
            passes(order, actual, range(4, 7)), passes(order, expected, range(4, 7)), "out"
        )
        actual.batch_select_indices(torch.tensor([True, False, False, True]))
        actual.batch_repeat_interleave(2)
        assert actual.keys.shape[0] == 4
        actual.reset()
        assert actual.keys is None and actual.get_seq_length() == 0


@pytest.mark.parametrize("name", evictors(16))
@torch.no_grad()
def test_what_is_left_is_packed(name: str) -> None:
    """Eight bits decode nearly as full precision does; the cache is as small as it says."""
    model = tiny_lm("Llama", head_dim=16)
    ids, mask = left_padded(2, 30, 6)
    with tokred.patch(model, name, **evictors(16)[name]):
        packed = tokred.PackedCache(model, bits=8, window=0)
        close = in_parts(model, ids, mask, packed, (20, 1, 1, 5, 1, 1, 1))
        cache = tokred.DenseCache(model)
        exact = in_parts(model, ids, mask, cache, (20, 1, 1, 5, 1, 1, 1))
        beams = generated(model, ids, mask, num_beams=2, **{
            cache_keyword(): tokred.PackedCache(model, window=0)})  # fmt: skip
    assert beams.shape == (2, 35)
    error = (close - exact)[mask.bool()]
    assert error.square().mean() < 1e-3 * exact[mask.bool()].var()
    assert 0 < packed.nbytes().total < 0.6 * cache.nbytes().total
    with pytest.raises(ValueError, match="tokens were evicted"):
        packed.bytes_per_token()


class BasePress:
    """kvpress's calling convention: the keys of a prompt that a rule on them keeps."""

    kept, seen = 7, 0

    def compress(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor,
        attentions: Any, kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert attentions is None and kwargs["cache_position"][-1] + 1 == keys.shape[2]
        assert kwargs["position_embeddings"][0].shape[1] == hidden_states.shape[1]
        assert module.rotary_emb is not None
        assert kwargs["past_key_values"].layers[module.layer_idx].get_seq_length() > 0
        self.seen += 1
        indices = keys[..., 0].topk(self.kept, dim=2).indices[..., None]
        return tuple(x.gather(2, indices.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))


def pressed(step: Step) -> Tensor:
    first = step.p.shape[1] == step.k.shape[1]
    return keep_best(step.k[..., 0], step.alive, 7) if first else step.alive


@torch.no_grad()
def test_a_press_runs_on_the_kernels() -> None:
    model = tiny_lm("Llama", head_dim=16)
    ids, mask = left_padded(2, sum(PARTS), 0)
    AttentionInterface.register("pressed", Transcribed(pressed, [0, 0]))
    AttentionMaskInterface.register("pressed", sdpa_mask)
    model.set_attn_implementation("pressed")
    expected = in_parts(model, ids, mask, dynamic(model))
    model.set_attn_implementation("sdpa")
    press = BasePress()
    with PressAdapter(press)(model):
        cache = dynamic(model)
        actual = in_parts(model, ids, mask, cache)
        packed = tokred.PackedCache(model, bits=8, window=0)
        close = in_parts(model, ids, mask, packed)
        assert generated(model, ids, None).shape == (2, sum(PARTS) + 5)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    assert (close - actual).square().mean() < 1e-3 * actual.var()
    assert press.seen == 3 * model.config.num_hidden_layers
    assert cache.layers[0].keys.shape[2] == 7 + sum(PARTS[1:])
    assert not hasattr(model.model.layers[0].self_attn, "rotary_emb")


@torch.no_grad()
def test_presses_that_do_more_are_refused(llama: nn.Module) -> None:
    ids, mask = left_padded(2, 12)

    class Hooked(BasePress):
        def forward_hook(self) -> None:
            pass

    class Hiding(BasePress):
        def compress(self, module: nn.Module, hidden_states: Tensor, *states: Any) -> Any:
            module.masked_key_indices = (0, 0, 0)
            return states[:2]

    class Growing(BasePress):
        def compress(self, module: nn.Module, hidden_states: Tensor, *states: Any) -> Any:
            return tuple(torch.cat([x, x], 2) for x in states[:2])

    with pytest.raises(TypeError, match="must have compress"):
        PressAdapter(object())
    with pytest.raises(ValueError, match="has a forward_hook of its own"):
        PressAdapter(Hooked())
    for press, words in ((Hiding(), "hides keys of some heads"), (Growing(), "K <= 12 tokens")):
        with PressAdapter(press)(llama), pytest.raises(ValueError, match=words):
            llama(ids, use_cache=True)
    with PressAdapter(BasePress())(llama), pytest.raises(ValueError, match="knows of no padding"):
        llama(ids, attention_mask=mask, use_cache=True)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an op returned."""

    bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", evictors(5))
@torch.no_grad()
def test_a_prompt_takes_memory_linear_in_its_length(llama: nn.Module, name: str) -> None:
    """Nothing is as large as a matrix of queries and keys; what is kept is as large as it says."""
    ids = torch.randint(97, (1, 1500), generator=generator(0))
    with tokred.patch(llama, name, **evictors(40)[name]), Largest() as largest:
        cache = llama.model(ids, use_cache=True).past_key_values
    # The MLP's and the largest of the methods': query heads of D float32 numbers.
    assert largest.bytes <= 1500 * 4 * 97 * 9
    if name not in ("ada_kv", "pyramid_kv"):
        assert all(
            layer.keys.untyped_storage().nbytes() <= 3 * 40 * 8 * 4 for layer in cache.layers
        )


@torch.no_grad()
def test_refusals(llama: nn.Module) -> None:
    ids, _ = left_padded(2, 12)
    keyword = cache_keyword()
    filled = dynamic(llama)
    llama(ids, **{keyword: filled})
    with tokred.patch(llama, "h2o", budget=4):
        static = transformers.StaticCache(config=llama.config, max_cache_len=20)
        wide = tiny_lm("Llama", head_dim=16).config
        packed = tokred.PackedCache(wide)
        for cache, words in (
            (filled, "holds 12 tokens from outside of the patch"),
            (static, "has a StaticLayer: pass a DynamicCache"),
            (packed, "make the PackedCache with window=0"),
            (tokred.PackedCache(wide, bits=2), "make it with key_axis='channel'"),
        ):
            with pytest.raises(ValueError, match=words):
                llama(ids, **{keyword: cache})
        apart = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).tril().bool()
        with pytest.raises(ValueError, match="hides keys from the last query"):
            llama(ids, attention_mask=apart.expand(2, 1, 12, 12), use_cache=True)
        with pytest.raises(ValueError, match="crop"):
            generated(llama, ids[:1], None, prompt_lookup_num_tokens=2)
        cache = dynamic(llama)
        llama(ids, **{keyword: cache})
        with pytest.raises(ValueError, match="cannot be taken back"):
            cache.layers[0].crop(-1)
        with tokred.patch(llama, "tova", budget=4), pytest.raises(ValueError, match="has kept"):
            llama(ids[:, :1], **{keyword: cache})
    llama.set_attn_implementation("sdpa")
    with pytest.raises((ValueError, AttributeError), match="evicted from this cache"):
        llama(ids[:, :1], **{keyword: cache})
    with pytest.raises(ValueError, match="keeps fewer keys"):
        tokred.patch(llama, "h2o", num_prefix=1)
    for name, options, words in (
        ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2), "attention sinks"),
    ):
        with pytest.raises(ValueError, match=words):
            tokred.patch(tiny_lm(name, **options), "snap_kv")


def test_gradients_are_refused(llama: nn.Module) -> None:
    ids, _ = left_padded(2, 12)
    with tokred.patch(llama, "h2o", budget=4), pytest.raises(ValueError, match="requires grad"):
        llama(ids, **{cache_keyword(): dynamic(llama)})
