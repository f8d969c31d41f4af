"""DenseCache beside transformers' DynamicCache: the same bits, without a copy of the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.compare import assert_bitwise_equal
from cases.inputs import generator
from cases.tiny_models import generated, left_padded, tiny_lm, transformers
from tokred.cache import CacheBytes, DenseCacheLayer
from tokred.compat import cache_keyword
from tokred.integrations.transformers import attention

DynamicCache = transformers.DynamicCache
SLIDING = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": lambda: tiny_lm("Llama"),
    "gemma3": lambda: tiny_lm("Gemma3Text", sliding_window=6, layer_types=SLIDING),
}


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return MODELS["llama"]()


def states(tokens: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    return tuple(torch.randn(batch, 3, tokens, dim, generator=draw) for dim in (16, 8))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tokred"])
def test_generation_is_that_of_a_dynamic_cache(name: str, implementation: str) -> None:
    """Greedy and beams, left padding, a prompt in parts, drafts that are taken back."""
    attention.register()
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    ids, mask = left_padded()
    lookup = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    for rows, options in (
        (2, {"output_logits": True, "return_dict_in_generate": True}),
        (2, {"num_beams": 3, "num_return_sequences": 2}),
        (2, {"prefill_chunk_size": 4}),
        (1, lookup),
    ):
        results = []
        for make in (lambda config: DynamicCache(config=config), tokred.DenseCache):
            options[cache_keyword()] = make(model.config)
            results.append(generated(model, ids[:rows], mask[:rows], **options))
        if "output_logits" in options:
            for ours, theirs in zip(*(result.logits for result in results), strict=True):
                assert_bitwise_equal(ours, theirs, "logits")
            results = [result.sequences for result in results]
        assert torch.equal(*results)


def test_chat_turns(llama: nn.Module) -> None:
    """A cache that is handed on, out of inference mode too, and one that is copied between."""
    llama.set_attn_implementation("sdpa")
    ids, _ = left_padded(1, 30)
    texts = []
    for cache, duplicate in (
        (DynamicCache(config=llama.config), copy.deepcopy),
        (tokred.DenseCache(llama.config), copy.copy),
    ):
        with torch.inference_mode():
            first = generated(llama, ids[:, :12], None, **{cache_keyword(): cache})
        both = [cache, duplicate(cache)]
        turn = torch.cat([first, ids[:, 12:20]], 1), torch.cat([first, ids[:, 20:25]], 1)
        texts.append([generated(llama, each, None, **{cache_keyword(): kept})
                      for each, kept in zip(turn, both, strict=True)])  # fmt: skip
    for ours, theirs in zip(*texts, strict=True):
        assert torch.equal(ours, theirs)


def test_every_call_does_what_a_dynamic_layer_does() -> None:
    ours, theirs = DenseCacheLayer(), transformers.cache_utils.DynamicLayer()
    tokens = 0

    def both(call: Any) -> None:
        for layer in (ours, theirs):
            call(layer)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert_bitwise_equal(ours.keys, theirs.keys, "keys")
        assert_bitwise_equal(ours.values, theirs.values, "values")

    for count in (5, 1, 0, 1, 40, 1):
        new = states(count, seed=tokens)
        both(lambda layer, new=new: layer.update(*new))
        tokens += count
    both(lambda layer: layer.crop(-11))
    both(lambda layer: layer.update(*states(3, seed=7)))
    both(lambda layer: layer.update(*(x.double() for x in states(1))))
    both(lambda layer: layer.reorder_cache(torch.tensor([1, 0])))
    both(lambda layer: layer.batch_repeat_interleave(3))
    both(lambda layer: layer.batch_select_indices(torch.tensor([4, 0])))
    both(lambda layer: layer.batch_select_indices(torch.tensor([False, True])))
    both(lambda layer: layer.update(layer.keys[:, :, 2:5], layer.values[:, :, 2:5]))
    both(lambda layer: (layer.offload(), layer.prefetch()))
    both(lambda layer: setattr(layer, "keys", layer.keys[:, :, ::2].contiguous()) or
         setattr(layer, "values", layer.values[:, :, ::2].contiguous()))  # fmt: skip
    both(lambda layer: layer.update(*(x.double() for x in states(2, 1))))
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.keys is None and ours.nbytes() == CacheBytes()


def test_a_token_is_written_in_place() -> None:
    layer = DenseCacheLayer()
    layer.update(*states(64))
    layer.update(*states(1))
    places = set()
    for _ in range(7):
        keys, values = layer.update(*states(1))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    held = layer.nbytes()
    assert held.full_precision == 72 * 2 * 3 * (16 + 8) * 4 and 0 < held.slack < held.total / 4
    layer = DenseCacheLayer(70)
    keys, _ = layer.update(*states(64))
    assert layer.get_max_length() == 70
    assert layer.update(*states(6))[0].data_ptr() == keys.data_ptr()
    assert layer.nbytes().slack == 0


def test_score_keys_are_the_keys_in_a_few_bits() -> None:
    """Whatever becomes of the tokens, their codes are those of `kv_pack`."""
    layer = DenseCacheLayer(score_bits=4)

    def check(keys: Tensor) -> None:
        expected = tokred.kv_pack(layer.keys, 4, 16, rotate=True)
        found = keys.score_keys
        assert_bitwise_equal(
            (found.codes, found.params), (expected.codes, expected.params), "score_keys"
        )

    for count in (5, 1, 0, 40, 1):
        check(layer.update(*states(count, seed=count))[0])
    layer.crop(-11)
    layer.reorder_cache(torch.tensor([1, 0]))
    check(layer.update(*states(3, seed=7))[0])
    layer.keys, layer.values = (x[:, :, ::2].contiguous() for x in (layer.keys, layer.values))
    check(layer.update(*states(1))[0])
    held = layer.nbytes()
    assert (held.codes, held.params) == (21 * 2 * 3 * 8, 21 * 2 * 3 * 4)
    layer.reset()
    check(layer.update(*states(2, 1))[0])
    assert not hasattr(DenseCacheLayer().update(*states(2))[0], "score_keys")


class ChoosesByCodes:
    """An attention whose single queries choose by rounded keys, and attend to whole ones."""

    def __init__(self, choose: Any) -> None:
        self.choose = choose

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float,
        **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        new, total, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        seen = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
        seen = seen if mask is None else mask
        rounded = tokred.kv_unpack(tokred.kv_pack(k, 4, 16, rotate=True))
        k, v, rounded = (x.repeat_interleave(group, 1).double() for x in (k, v, rounded))
        if new == 1:
            seen = seen & self.choose(q.double() @ rounded.mT, seen.expand(len(q), 1, 1, -1))
        logits = (q.double() @ k.mT * scaling).masked_fill(~seen, -torch.inf)
        out = logits.softmax(3).nan_to_num(0) @ v
        return out.to(q.dtype).transpose(1, 2).contiguous(), None


def largest(logits: Tensor, seen: Tensor) -> Tensor:
    """The three largest of every head."""
    chosen = logits.masked_fill(~seen, -torch.inf).topk(3, dim=3).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(3, chosen, True)


def voted(logits: Tensor, seen: Tensor) -> Tensor:
    """The first, the last two, and the one between that most softmax mass of all heads is on."""
    place = seen.cumsum(3)
    ends = seen & ((place <= 1) | (place > place.amax(3, keepdim=True) - 2))
    between = seen & ~ends
    votes = logits.masked_fill(~between, -torch.inf).softmax(3).sum(1, keepdim=True)
    chosen = votes.masked_fill(~between, -torch.inf).topk(1, dim=3).indices
    return ends | torch.zeros_like(votes, dtype=torch.bool).scatter(3, chosen, True)


@pytest.mark.parametrize(
    ("name", "options", "choose"),
    [("top_k_attention", {"k": 3, "prefill": "dense"}, largest),
     ("token_select", {"k": 1, "n_init": 1, "n_local": 2}, voted)],
)  # fmt: skip
@torch.no_grad()
def test_keys_are_chosen_by_their_codes(name: str, options: dict, choose: Any) -> None:
    model = tiny_lm("Llama", head_dim=16)
    ids, mask = left_padded(2, 20, 6)
    transformers.AttentionInterface.register("by_codes", ChoosesByCodes(choose))
    transformers.AttentionMaskInterface.register("by_codes", transformers.masking_utils.sdpa_mask)

    def logits(cache: Any) -> Tensor:
        parts = [
            model(ids[:, start:stop], attention_mask=mask[:, :stop],
                  position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, start:stop],
                  **{cache_keyword(): cache}).logits
            for start, stop in ((0, 14), *((i, i + 1) for i in range(14, 20)))
        ]  # fmt: skip
        return torch.cat(parts, 1)[mask.bool()]

    model.set_attn_implementation("by_codes")
    expected = logits(DynamicCache(config=model.config))
    model.set_attn_implementation("sdpa")
    with tokred.patch(model, name, **options):
        torch.testing.assert_close(
            logits(tokred.DenseCache(model, score_bits=4)), expected, rtol=2e-3, atol=2e-3
        )
        exact = logits(tokred.DenseCache(model))
    assert (exact - expected).abs().max() > 0.1


def test_refusals(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="score_bits must be 1, 2, 3, 4, 8 or None, got 5"):
        tokred.DenseCache(llama.config, score_bits=5)
    narrow = tokred.DenseCache(llama.config, score_bits=4)
    with pytest.raises(ValueError, match="score_bits needs a head_dim"):
        narrow.update(*(x[..., :8] for x in states(4)), 0)
    assert narrow.get_seq_length() == 0
    with pytest.raises(
        ValueError, match="capacity must be at least 1 and at most 2147483647, got 0"
    ):
        tokred.DenseCache(llama.config, capacity=0)
    with pytest.raises(ValueError, match=r"has none: use a transformers\.DynamicCache"):
        tokred.DenseCache(transformers.MistralConfig(num_hidden_layers=1, sliding_window=4))
    cache = tokred.DenseCache(llama.config, capacity=5)
    cache.update(*states(4), 0)
    keys, values = states(2)
    for bad, words in (
        ((keys, values), "capacity of 5 tokens and holds 4: there is no room for 2 more"),
        ((keys[:1], values[:1]), "the cache holds keys .* reset"),
        ((keys, values[:, :, :1]), "must be of the same tokens"),
        ((keys[0], values[0]), "key_states must be"),
        ((keys[:, :, :1].clone().requires_grad_(), values[:, :, :1]), "requires grad"),
    ):
        with pytest.raises(ValueError, match=words):
            cache.update(*bad, 0)
        assert cache.get_seq_length() == 4
    for tokens, words in ((1, "as a negative one"), (-5, "holds 4 tokens")):
        with pytest.raises(ValueError, match=words):
            cache.layers[0].crop(tokens)
