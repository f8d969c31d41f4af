"""Ways to generate, with a method that chooses every key, with a packed cache, and with both.

The models stand for what differs between families: grouped heads with rotary positions, layers with
a sliding window beside full ones, learned positions, and an encoder-decoder. Each mode gives the
text that the model's own attention gives, or is refused where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_models import left_padded, tiny_bart, tiny_lm, transformers
from tokred.compat import cache_keyword

pytestmark = pytest.mark.usefixtures("one_thread")

CACHE = cache_keyword()
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


def _gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@cache
def model_of(name: str) -> nn.Module:
    model = {
        "llama": lambda: tiny_lm("Llama", head_dim=16),
        "gemma3": lambda: tiny_lm("Gemma3Text", head_dim=16, query_pre_attn_scalar=16, **SLIDING),
        "gpt2": _gpt2,
        "bart": tiny_bart,
    }[name]()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def generate(model: nn.Module, **options: Any) -> Tensor:
    """Six tokens for a prompt of two rows, the second of which begins with padding."""
    ids, mask = left_padded()
    rows = options.pop("rows", 2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    torch.manual_seed(0)
    return model.generate(ids[:rows], attention_mask=mask[:rows], **options)


def new_cache(model: nn.Module, kind: str) -> Any:
    """A cache of two kinds; a packed one keeps all tokens in its window, in full precision."""
    made = transformers.DynamicCache(config=model.config)
    if kind == "packed":
        made = tokred.PackedCache(model, 8, window=64, rotate=False)
    if model.config.is_encoder_decoder:
        cross = transformers.DynamicCache(config=model.config)
        made = transformers.EncoderDecoderCache(made, cross)
    return made


def with_draft(model: nn.Module, **options: Any) -> Tensor:
    return generate(model, rows=1, assistant_model=tiny_lm("Llama", num_hidden_layers=1), **options)


def chat(model: nn.Module, **options: Any) -> Tensor:
    """A second turn goes on with the cache of the first."""
    first = generate(model, rows=1, **options)
    turn = torch.cat([first, torch.tensor([[5, 6, 7]])], 1)
    return model.generate(turn, max_new_tokens=6, do_sample=False, **options)


def plain(**fixed: Any) -> Callable[..., Tensor]:
    return lambda model, **options: generate(model, **fixed, **options)


MODES: dict[str, Callable[..., Tensor]] = {
    "greedy": plain(),
    "beams": plain(num_beams=3),
    "several sequences": plain(num_beams=3, num_return_sequences=2),
    "sampling": plain(do_sample=True, top_k=20, num_return_sequences=2),
    "prompt lookup": plain(rows=1, prompt_lookup_num_tokens=3),
    "assisted": with_draft,
    "chat": chat,
    "prompt in chunks": plain(prefill_chunk_size=5),
}
# An encoder-decoder does not go on with a text; the draft model is a Llama.
LACKS = {"bart": ("assisted", "prompt lookup", "chat", "prompt in chunks"),
         "gemma3": ("assisted",), "gpt2": ("assisted",)}  # fmt: skip


PAIRS = [
    (name, mode)
    for name in ("llama", "gemma3", "gpt2", "bart")
    for mode in MODES
    if mode not in LACKS.get(name, ())
]


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_the_text_is_that_of_eager_attention(name: str, mode: str) -> None:
    model, run = model_of(name), MODES[mode]
    model.set_attn_implementation("eager")
    expected = run(model, **{CACHE: new_cache(model, "dynamic")})
    for method, kind in (("token_select", "dynamic"), ("top_k_attention", "packed")):
        with tokred.patch(model, method, k=99):
            assert torch.equal(run(model, **{CACHE: new_cache(model, kind)}), expected), method
    model.set_attn_implementation("tokred")
    assert torch.equal(run(model, **{CACHE: new_cache(model, "packed")}), expected), "packed"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_static_cache(name: str) -> None:
    model = model_of(name)
    model.set_attn_implementation("eager")
    expected = generate(model)
    with tokred.patch(model, "token_select", k=99):
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generate(model, **options), expected)


def test_parts_of_a_prompt_choose_among_packed_keys() -> None:
    """Several queries of a packed cache choose as they would one after another."""
    model = model_of("llama")
    ids, mask = left_padded()
    logits = []
    for step in (4, 1):
        cache = new_cache(model, "packed")
        with torch.no_grad(), tokred.patch(model, "top_k_attention", k=3):
            parts = [model(ids[:, :5], attention_mask=mask[:, :5], **{CACHE: cache}).logits]
            for start in range(5, 13, step):
                stop = start + step
                options = {"attention_mask": mask[:, :stop], CACHE: cache}
                parts.append(model(ids[:, start:stop], **options).logits)
        logits.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
