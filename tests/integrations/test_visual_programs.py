"""Vision-language models as programs use them: chats, other precisions, changes in the patch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokred
from cases.tiny_vlms import FAMILIES, IMAGES, transformers

pytestmark = pytest.mark.usefixtures("one_thread")
BY_NAME = {family.name: family for family in FAMILIES}


def generate(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    return model.generate(
        **inputs, do_sample=False, suppress_tokens=list(IMAGES), **{"max_new_tokens": 3, **options}
    )


def clip() -> nn.Module:
    small: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    text = dict(**small, vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(**small, image_size=56, patch_size=7)
    )
    return transformers.CLIPModel(config).eval()


@torch.no_grad()
def test_text_encoders_are_no_language_models() -> None:
    with tokred.patch(clip(), "faster_vlm", keep=20) as handle:
        handle.model(input_ids=torch.tensor([[3, 2]]), pixel_values=torch.randn(1, 3, 56, 56))
        assert handle.counts[-1] == 21
    with pytest.raises(ValueError, match=r"CLIPModel has no layer.*a language_model of its own"):
        tokred.patch(clip(), "visionzip")


@pytest.mark.parametrize("name", ["vispruner", "zoo_prune", "flash_vlm"])
@torch.no_grad()
def test_encoders_that_leave_their_tokens_transposed(name: str) -> None:
    family = BY_NAME["llava_siglip"]
    model, inputs = family.model(), family.prompt((1, 2))
    with tokred.patch(model, name, keep=4) as handle:
        assert model(**inputs).logits.isfinite().all()
        assert handle.counts == ((36, 4),) * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["zoo_prune", "dart"])
@torch.no_grad()
def test_models_of_other_precisions(name: str, dtype: torch.dtype) -> None:
    family = BY_NAME["llava"]
    model, inputs = family.model(dtype), family.prompt((1, 2))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with tokred.patch(model, name, keep=6):
        output = model(**inputs)
    assert output.logits.isfinite().all()
    assert output.logits.shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "gemma3", "llava_next"])
@torch.no_grad()
def test_a_chat_generates_on_its_cache(kind: str) -> None:
    """As transformers' generate does, which passes dropped tokens again: the cache has fewer."""
    family = BY_NAME[kind]
    model, inputs = family.model(), family.prompt((1, 2, 0))
    with tokred.patch(model, "divprune", keep=5):
        first = generate(model, inputs, return_dict_in_generate=True)
        question = torch.arange(5, 14).view(3, 3)
        ids = torch.cat([first.sequences, question], 1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]

        def longer(x: Tensor, value: int) -> Tensor:
            return torch.cat([x, torch.full((3, new), value)], 1)

        chat = {"input_ids": ids, "attention_mask": longer(inputs["attention_mask"], 1)}
        for types in ("token_type_ids", "mm_token_type_ids"):
            if types in inputs:
                chat[types] = longer(inputs[types], 0)
        tokens = generate(model, chat, cache=first.cache)
        assert torch.equal(tokens, generate(model, {**inputs, **chat}))


@torch.no_grad()
def test_a_cache_that_another_method_has_pruned() -> None:
    """Before the language model all methods leave the same; between its layers, only some."""
    family = BY_NAME["llava"]
    model, inputs = family.model(), family.prompt((1,))
    token = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 46).long()}
    with tokred.patch(model, "divprune", keep=4):
        cache, same = model(**inputs).cache, model(**inputs).cache
        expected = model(**token, cache=cache).logits
    with tokred.patch(model, "fastv", keep=4):
        assert torch.equal(model(**token, cache=same).logits, expected)
        cache, same = model(**inputs).cache, model(**inputs).cache
        expected = model(**token, cache=cache).logits
    with (
        tokred.patch(model, "divprune", keep=4),
        pytest.raises(ValueError, match="go on inside its patch"),
    ):
        model(**token, cache=same)
    with tokred.patch(model, "pyramid_drop", keep=4):
        assert torch.equal(model(**token, cache=same).logits, expected)


@torch.no_grad()
def test_attention_that_is_chosen_inside_the_patch() -> None:
    for kind, name in [("llava", "visionzip"), ("qwen2_vl", "visionzip"), ("llava", "fastv")]:
        family = BY_NAME[kind]
        model, inputs = family.model(), family.prompt((1,))
        with tokred.patch(model, name, keep=4):
            model.set_attn_implementation("eager")
            with pytest.raises(
                (ValueError, RuntimeError), match="attn_implementation before the patch"
            ):
                model(**inputs)
            model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_token_types_that_do_not_fit() -> None:
    family = BY_NAME["qwen2_vl"]
    model, inputs = family.model(), family.prompt((1,))
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :-1]
    inputs["position_ids"] = torch.arange(15).expand(3, 1, 15)
    with (
        tokred.patch(model, "divprune", keep=4),
        pytest.raises(ValueError, match=r"mm_token_type_ids must be \[1, 15\].* got \[1, 14\]"),
    ):
        model(**inputs)


def test_there_is_no_token_map() -> None:
    family = BY_NAME["llava"]
    with (
        tokred.patch(family.model(), "visionzip", keep=4) as handle,
        pytest.raises(RuntimeError, match="this one works in a language model"),
    ):
        handle.token_map  # noqa: B018


@torch.no_grad()
def test_a_packed_cache_makes_its_attention_known() -> None:
    """In a process that uses nothing else of tokred, as the docstring of PackedCache says."""
    code = """
import torch, transformers, tokred
small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=99)).eval()
cache = tokred.PackedCache(model.config, bits=4)
model.set_attn_implementation("tokred")
model.generate(torch.tensor([[3, 4, 5]]), cache=cache, max_new_tokens=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
