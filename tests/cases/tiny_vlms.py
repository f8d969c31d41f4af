"""Tiny vision-language models of every family that is served, and prompts with images for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
if "mm_encoder_outputs" not in inspect.signature(transformers.LlavaModel.forward).parameters:
    pytest.skip("this transformers has no mm_encoder_outputs", allow_module_level=True)

VOCABULARY, IMAGE, VIDEO, START, END, PAD = 99, 90, 91, 92, 93, 0
IMAGES = (IMAGE, VIDEO)  # what a model must not generate
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
    image_size=48, patch_size=8,
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def _llava(name: str, tower: str, **options: Any) -> nn.Module:
    kinds = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig"}
    vision = {**VISION, "vision_use_head": False} if tower == "siglip" else VISION
    config = getattr(transformers, f"{name}Config")(
        vision_config=getattr(transformers, kinds[tower])(**vision),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE, image_token_id=IMAGE, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _one_token_a_patch(name: str, text: Any, **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text, image_token_id=IMAGE, image_token_index=IMAGE, **options,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _gemma3() -> nn.Module:
    text = transformers.Gemma3TextConfig(
        **TEXT, head_dim=8, sliding_window=7, sliding_window_pattern=2
    )
    return _one_token_a_patch(
        "Gemma3", text, mm_tokens_per_image=9, boi_token_index=START, eoi_token_index=END
    )


def _paligemma() -> nn.Module:
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    return _one_token_a_patch("PaliGemma", text, projection_dim=32)


def _qwen(name: str, **vision: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(depth=3, num_heads=2, in_channels=3, patch_size=8,
                           spatial_merge_size=2, temporal_patch_size=2, **vision),
        text_config=dict(**TEXT, head_dim=8, rope_parameters=MROPE),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _internvl() -> nn.Module:
    vision = {**VISION, "image_size": [48, 48], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision),
        text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def _idefics(name: str) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION, text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


PINPOINTS = [[96, 48], [48, 96], [96, 96]]
SIZES = [(90, 96), (48, 96), (20, 96)]  # of images of any resolution: height, width


@dataclass(frozen=True)
class Family:
    """A family of models.

    tokens: of the i-th image in the prompt. kind: how its images are given. has_class_token:
    whether its encoder has one.
    """

    name: str
    build: Callable[[], nn.Module]
    kind: str
    tokens: Callable[[int], int]
    has_class_token: bool = False

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.build()
        for parameter in model.parameters():
            # Fresh models attend almost evenly; larger weights make every step matter.
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.25)
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()

    def prompt(
        self, images: Sequence[int] = (1,), text: int = 5, padding: str = "left"
    ) -> dict[str, Any]:
        """Inputs of rows with so many images; the rows' texts differ in length.

        Every row is: text, images with a token between them, text.
        """
        torch.manual_seed(1)
        count = sum(images)
        rows, number = [], 0
        for row, inside in enumerate(images):
            ids = torch.randint(3, 80, (2,)).tolist()
            for _ in range(inside):
                ids += [START, *[IMAGE] * self.tokens(number), END]
                number += 1
            rows.append(ids + torch.randint(3, 80, (text + 2 * row,)).tolist())
        length = max(map(len, rows))
        blank = [[PAD] * (length - len(ids)) for ids in rows]
        order = (lambda ids, pad: pad + ids) if padding == "left" else (lambda ids, pad: ids + pad)
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([order(*pair) for pair in zip(rows, blank, strict=True)]),
            "attention_mask": torch.tensor(
                [order([1] * len(ids), pad) for ids, pad in zip(rows, blank, strict=True)]
            ),
        }
        types = (inputs["input_ids"] == IMAGE).long()
        if self.kind == "grid":
            inputs["mm_token_type_ids"] = types
        if self.name in ("gemma3", "paligemma"):
            inputs["token_type_ids"] = types
        return inputs | (self.pixels(images) if count else {})

    def alone(self, inputs: dict[str, Any], images: Sequence[int], row: int) -> dict[str, Any]:
        """One row of prompt(images), without its padding."""
        there = inputs["attention_mask"][row].bool()
        first, count = sum(images[:row]), images[row]
        found = {
            name: inputs[name][row, there][None]
            for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
            if name in inputs
        }
        if not count:
            return found
        mine = slice(first, first + count)
        if self.kind == "grid":
            patches = inputs["image_grid_thw"].prod(-1)
            start, stop = int(patches[:first].sum()), int(patches[: first + count].sum())
            pixels = inputs["pixel_values"][start:stop]
            return found | {
                "pixel_values": pixels,
                "image_grid_thw": inputs["image_grid_thw"][mine],
            }
        if self.kind == "anyres":
            found["image_sizes"] = inputs["image_sizes"][mine]
        if self.kind == "rows":
            return found | {"pixel_values": inputs["pixel_values"][row : row + 1, :count]}
        return found | {"pixel_values": inputs["pixel_values"][mine]}

    def pixels(self, images: Sequence[int]) -> dict[str, Any]:
        """The images of rows with so many each."""
        count = sum(images)
        if self.kind == "grid":
            grids = torch.tensor([[1, 6, 4 + 2 * (i % 2)] for i in range(count)])
            patches = int(grids.prod(-1).sum())
            return {"pixel_values": torch.randn(patches, 3 * 2 * 64), "image_grid_thw": grids}
        if self.kind == "anyres":
            sizes = torch.tensor([SIZES[i % len(SIZES)] for i in range(count)])
            return {"pixel_values": torch.randn(count, 5, 3, 48, 48), "image_sizes": sizes}
        if self.kind == "rows":
            pixels = torch.zeros(len(images), max(images), 3, 48, 48)
            for row, inside in enumerate(images):
                pixels[row, :inside] = torch.randn(inside, 3, 48, 48)
            return {"pixel_values": pixels}
        return {"pixel_values": torch.randn(count, 3, 48, 48)}


def _anyres_tokens(number: int) -> int:
    """Tokens of an image of SIZES[number]: a thumbnail, rows of patches, each with a newline."""
    height, width = SIZES[number % len(SIZES)]
    best = min(
        (p for p in PINPOINTS if p[0] >= height and p[1] >= width), key=lambda p: p[0] * p[1]
    )
    rows, columns = best[0] // 8, best[1] // 8
    if width / height > columns / rows:
        new = int(round(height * columns / width, 7))
        rows -= 2 * ((rows - new) // 2)
    else:
        new = int(round(width * rows / height, 7))
        columns -= 2 * ((columns - new) // 2)
    return 36 + rows * (columns + 1)


def _qwen_tokens(number: int) -> int:
    return 3 * (2 + number % 2)


FAMILIES = [
    Family("llava", lambda: _llava("Llava", "clip"), "plain", lambda i: 36, True),
    Family("llava_siglip",
           lambda: _llava("Llava", "siglip", vision_feature_select_strategy="full"),
           "plain", lambda i: 36),
    Family("llava_next",
           lambda: _llava("LlavaNext", "clip", image_grid_pinpoints=PINPOINTS),
           "anyres", _anyres_tokens, True),
    Family("llava_onevision",
           lambda: _llava("LlavaOnevision", "siglip", image_grid_pinpoints=PINPOINTS,
                          vision_feature_select_strategy="full", vision_feature_layer=-1),
           "anyres", _anyres_tokens),
    Family("qwen2_vl",
           lambda: _qwen("Qwen2VL", embed_dim=16, hidden_size=32, mlp_ratio=2), "grid",
           _qwen_tokens),
    Family("qwen2_5_vl",
           lambda: _qwen("Qwen2_5_VL", hidden_size=16, intermediate_size=32, out_hidden_size=32,
                         window_size=32, fullatt_block_indexes=[2]), "grid", _qwen_tokens),
    Family("qwen3_vl",
           lambda: _qwen("Qwen3VL", hidden_size=16, intermediate_size=32, out_hidden_size=32,
                         num_position_embeddings=64, deepstack_visual_indexes=[0, 1]), "grid",
           _qwen_tokens),
    Family("internvl", _internvl, "plain", lambda i: 9, True),
    Family("paligemma", _paligemma, "plain", lambda i: 36),
    Family("idefics3", lambda: _idefics("Idefics3"), "rows", lambda i: 9),
    Family("smolvlm", lambda: _idefics("SmolVLM"), "rows", lambda i: 9),
    Family("gemma3", _gemma3, "plain", lambda i: 9),
]  # fmt: skip
