"""A vision-language model that reads 320 of 2880 visual tokens, beside the unpatched one with SDPA.

Shaped as LLaVA-NeXT: an image of five crops of 336 pixels, CLIP ViT-L/14, and a language model of
half a billion parameters, all of real size in a layer and with a few layers each; random weights,
which only time. A model of 24 layers in both spends more of its time in the encoder: the prompt is
therefore timed from pixels and from the encoded image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import tokred
from tokred import methods
from tokred.patching import Patch, Settings, VisualCall

from .bench_models import UNPATCHED, sharing_copy
from .harness import Case
from .machine import DTYPES, Run

IMAGE, KEEP, TEXT = 31999, 320, 48
OPTIONS: dict[str, Any] = {"keep": KEEP, "newlines": "drop"}
METHODS = ("visionzip", "fastv")
BEFORE = ("visionzip", "faster_vlm")  # before the language model


def llava_next(language_layers: int, vision_layers: int) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        Qwen2Config,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=vision_layers,
        num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=language_layers,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=32000,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE,
        image_grid_pinpoints=[[672, 672]],
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config).eval()


def prompt(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """A text around one square image: 576 tokens of the thumbnail, 48 rows of 48 and a newline."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 30000, (TEXT,), generator=generator).tolist()
    ids = [*words[:16], *[IMAGE] * (576 + 48 * 49), *words[16:]]
    pixels = torch.randn(1, 5, 3, 336, 336, generator=generator)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "image_sizes": torch.tensor([[672, 672]]),
        "pixel_values": pixels.to(dtype),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def patched_models(model: nn.Module) -> dict[str, nn.Module]:
    """The model and its patched copies, by candidate; parameters are shared."""
    models = {UNPATCHED: model}
    for method in METHODS:
        models[f"tokred {method}"] = sharing_copy(model)
        tokred.apply(models[f"tokred {method}"], method, **OPTIONS)
    return models


def first_token(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, logits_to_keep=1).logits


def from_pixels(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    models = patched_models(model)
    return {name: partial(first_token, m, inputs) for name, m in models.items()}


def from_the_encoded_image(
    model: nn.Module, inputs: dict[str, Tensor]
) -> dict[str, Callable[[], Any]]:
    calls = {}
    for name, m in patched_models(model).items():
        encoded = m.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        given = {key: x for key, x in inputs.items() if key != "pixel_values"}
        given["mm_encoder_outputs"] = {"image": encoded}
        calls[name] = partial(first_token, m, given)
    return calls


def next_token(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    calls = {}
    token = torch.tensor([[5]], device=inputs["input_ids"].device)
    for name, m in patched_models(model).items():
        cache = m(**inputs, logits_to_keep=1).cache
        calls[name] = partial(m, input_ids=token, cache=cache)
    return calls


def reduction(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """What methods do before the language model, from what the encoder has computed."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in BEFORE:
        seen: list[VisualCall] = []
        method = methods.get(name).options(**OPTIONS)
        listen = {"reduce_visual": lambda _, call, seen=seen: seen.append(call)}
        listener = type("Listener", (type(method),), listen)
        with Patch(model, listener(**OPTIONS), Settings()):
            first_token(model, inputs)
        calls[f"tokred {name}"] = partial(method.reduce_visual, seen[0])
    return calls


def cases(run: Run) -> Iterator[Case]:
    if not find_spec("transformers"):
        return
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    layers = (8, 2) if run.quick else (24, 24)
    model = llava_next(*layers).to(run.device, DTYPES[dtype])
    inputs = prompt(DTYPES[dtype], run.device)
    shape = (1, 2880, KEEP, 896, *layers)
    for name, build in (
        ("first token, from pixels", from_pixels),
        ("first token, from the encoded image", from_the_encoded_image),
        ("next token", next_token),
        ("reduction alone", reduction),
    ):
        yield Case(
            "vision_language", name, shape, dtype, partial(build, model, inputs),
            "random weights", context=torch.inference_mode,
        )  # fmt: skip
