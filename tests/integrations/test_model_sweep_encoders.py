"""Every family of encoders and denoisers that the installed libraries build small.

Nothing to merge gives the model's own bits; something to merge gives results of the same shape, or
one error when the patch is made; the model is as before afterwards, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import tokred
from bench import encoder_families, model_families
from cases.tiny_models import (
    HF,
    TIMM,
    VisionTransformer,
    attributes,
    reducers,
    require_dinov2,
    transformers,
)
from tokred import compat
from tokred.methods import METHODS

VISION = {**HF, "intermediate_size": 64}
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
TEXT_IDS = torch.tensor([[1, 2, 3]] * 2)
GRID = "grid and needs all of them"
EVERY = "needs every token"


def pixels(side: int = 48) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.to_tuple() if hasattr(output, "to_tuple") else output
    if not isinstance(parts, tuple | list):
        return []
    return [tensor for part in parts for tensor in tensors(part)]


@dataclass(frozen=True)
class Family:
    """A model, how it is called, and what the error says where it cannot serve fewer tokens."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any] = lambda model: model(pixels())
    refused: str = ""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()


def timm_vit(**options: Any) -> nn.Module:
    return VisionTransformer(**{**TIMM, **options})


def timm_named(name: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = dict(img_size=48, embed_dim=32, depth=3, num_heads=2)
    return lambda: timm.create_model(name, **{**sizes, **options})


def hf(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = HF if "Dinov2" in config else VISION
    build = getattr(transformers, config)

    def model() -> nn.Module:
        require_dinov2(name)
        return getattr(transformers, name)(build(**{**sizes, **options}))

    return model


def two_towers(name: str) -> Callable[[], nn.Module]:
    kind = name.removesuffix("Model").removesuffix("ForImageClassification")
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, name)(config(text_config=TEXT, vision_config=VISION))


def depth_anything() -> nn.Module:
    require_dinov2("Dinov2")
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = {**HF, "num_hidden_layers": 4, "out_features": stages}
    backbone.update(apply_layernorm=True, reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**backbone),
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=4,
        patch_size=8,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(vocab_size=50, **TEXT),
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config)


def captioner() -> nn.Module:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION),
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=2, vocab_size=50, is_decoder=True, add_cross_attention=True
        ),
    )
    return transformers.VisionEncoderDecoderModel(config)


def timm_in_transformers() -> nn.Module:
    sizes = dict(img_size=48, embed_dim=32, depth=3, num_heads=2)
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    return transformers.TimmWrapperModel(config)


FAMILIES = (
    Family("timm ViT", timm_vit),
    Family("timm DeiT", lambda: timm.models.deit.VisionTransformerDistilled(**TIMM)),
    Family("timm NaFlex", timm_named("naflexvit_base_patch16_gap")),
    Family("timm in transformers", timm_in_transformers),
    Family("ViT classifier", hf("ViTForImageClassification", "ViTConfig")),
    Family("DeiT classifier", hf("DeiTForImageClassificationWithTeacher", "DeiTConfig")),
    Family("DINOv2 classifier", hf("Dinov2ForImageClassification", "Dinov2Config")),
    Family(
        "DINOv2 with registers",
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    ),
    Family("CLIP projection", hf("CLIPVisionModelWithProjection", "CLIPVisionConfig")),
    Family("CLIP classifier", two_towers("CLIPForImageClassification")),
    Family(
        "SigLIP",
        two_towers("SiglipModel"),
        lambda model: model(pixel_values=pixels(), input_ids=TEXT_IDS).image_embeds,
    ),
    Family("SigLIP classifier", two_towers("SiglipForImageClassification")),
    Family(
        "captioner",
        captioner,
        lambda model: model(pixel_values=pixels(), decoder_input_ids=TEXT_IDS).logits,
    ),
    Family("timm features", timm_named("vit_tiny_patch16_224", features_only=True), refused=GRID),
    Family("timm MobileViT", lambda: timm.create_model("mobilevit_xxs"), refused="num_prefix|grid"),
    Family(
        "timm PiT",
        lambda: timm.create_model("pit_ti_224"),
        lambda model: model(pixels(224)),
        "num_prefix|grid",
    ),
    Family("masked ViT", hf("ViTForMaskedImageModeling", "ViTConfig"), refused=EVERY),
    Family("masked DeiT", hf("DeiTForMaskedImageModeling", "DeiTConfig"), refused=EVERY),
    Family("DINOv2 backbone", hf("Dinov2Backbone", "Dinov2Config"), refused=EVERY),
    Family("DepthAnything", depth_anything, refused=EVERY),
    Family(
        "LLaVA",
        llava,
        lambda model: model(pixel_values=pixels(), input_ids=torch.tensor([[1] + [3] * 36] * 2)),
        EVERY,
    ),
    Family("DINOv3", hf("DINOv3ViTModel", "DINOv3ViTConfig")),
    Family(
        "BEiT with relative positions",
        hf("BeitModel", "BeitConfig", use_relative_position_bias=True),
        refused="a bias for every pair of positions",
    ),
    Family("timm Twins", lambda: timm.create_model("twins_svt_small"), refused="has no layer"),
)
SERVED = [family for family in FAMILIES if not family.refused]
EVERY_METHOD = ("timm ViT", "DINOv2 with registers", "SigLIP", "DINOv3")  # others: two of them
REFUSED = [family for family in FAMILIES if family.refused]


def name_of(family: Family | model_families.Family) -> str:
    return family.name


@torch.no_grad()
@pytest.mark.parametrize("family", SERVED, ids=name_of)
def test_served(family: Family) -> None:
    model = family.model()
    before, plain = attributes(model), tensors(family.run(model))
    with tokred.patch(model, "tome", r=0):
        same = tensors(family.run(model))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(same, plain, strict=True))
    methods = reducers()
    if family.name not in EVERY_METHOD:
        methods = {method: methods[method] for method in ("tome", "evit")}
    for method, options in methods.items():
        with tokred.patch(model, method, trace_source=True, **options) as handle:
            merged = tensors(family.run(model))
            assert handle.counts[-1] < handle.counts[0], f"{method} merges nothing: {options}"
            kept = (handle.token_map >= 0).sum(1)  # all but those that the method drops
            assert torch.equal(handle.size.sum(1), kept.to(handle.size.dtype)), method
        assert merged[0].shape[::2] == plain[0].shape[::2]
        assert merged[0].isfinite().all()
        with pytest.raises(ZeroDivisionError), tokred.patch(model, method, **options):
            layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
            stop = layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                family.run(model)
            finally:
                stop.remove()
        assert attributes(model) == before
    again = tensors(family.run(model))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", REFUSED, ids=name_of)
def test_refused_when_the_patch_is_made(family: Family) -> None:
    model = family.model()
    before = attributes(model)
    for method, options in reducers().items():
        if "vision_language" in METHODS[method].options.adapters:
            continue  # some of these models are what it is for
        with pytest.raises(ValueError, match=family.refused):
            tokred.patch(model, method, **options)
    assert attributes(model) == before


@torch.no_grad()
def test_what_needs_every_token_gets_them_back() -> None:
    """With nothing to merge, restore_tokens is not needed."""
    prefix = {"timm MobileViT": 0, "timm PiT": 1}
    for family in REFUSED:
        if not any(word in family.refused for word in (GRID, EVERY, "num_prefix")):
            continue
        model, first = family.model(), prefix.get(family.name)
        plain = tensors(family.run(model))
        with tokred.patch(model, "tome", r=0, num_prefix=first):
            same = tensors(family.run(model))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(same, plain, strict=True))
        with tokred.patch(model, "tome", r=2, num_prefix=first, restore_tokens=True) as handle:
            merged = tensors(family.run(model))
            assert all(len(state.counts) > 1 for state in handle.states[:1]), family.name
        for ours, theirs in zip(merged, plain, strict=True):
            assert ours.shape == theirs.shape and ours.isfinite().all(), family.name


@dataclass(frozen=True)
class EverySecond:
    """A method that drops every second token behind the prefix in the first layer."""

    adapters = ("timm", "transformers")

    def layers(self, num_layers: int) -> list[int]:
        return [0]

    def plan(self, call: tokred.patching.ReductionCall) -> Tensor:
        rows = torch.arange(call.x.shape[1])
        rows = rows[(rows < call.num_prefix) | (rows % 2 == 0)]
        return rows.int().repeat(len(call.x), 1)


def of_rows(value: Any, rows: Tensor, tokens: int) -> Any:
    """What a layer is given, for some of its tokens: masks and tables of rotations."""
    if isinstance(value, tuple):
        return tuple(of_rows(each, rows, tokens) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4:
        return value[:, :, rows][..., rows]
    behind = tokens - value.shape[-2]
    return value[..., rows[rows >= behind] - behind, :]


@torch.no_grad()
@pytest.mark.parametrize("name", ["DINOv3", "EVA-02 of timm", "DINOv3 of timm", "ModernBERT"])
def test_positions_go_with_the_tokens(name: str) -> None:
    """The layers behind are the model's own, on the tokens, rotations and windows that are left."""
    family = next(each for each in encoder_families.FAMILIES if each.name == name)
    model = family.build()
    kinds = ("DINOv3ViTLayer", "EvaBlock", "ModernBertEncoderLayer")
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    given: list[tuple[Tensor, dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args[0], kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    family.run(model)
    for hook in hooks:
        hook.remove()
    tokens = given[0][0].shape[1]
    seen: list[Tensor] = []
    stop = layers[-1].register_forward_hook(lambda _, args, output: seen.append(output))
    with tokred.patching.Patch(
        model, EverySecond(), tokred.patching.Settings(restore_tokens=False, prop_attn=False)
    ) as handle:
        family.run(model)
        prefix = handle.num_prefix
    stop.remove()
    rows = torch.arange(tokens)
    rows = rows[(rows < prefix) | (rows % 2 == 0)]
    x = layers[0](given[0][0], **given[0][1])[:, rows]
    for layer, (_, kwargs) in zip(layers[1:], given[1:], strict=True):
        kept = {key: of_rows(value, rows, tokens) for key, value in kwargs.items()}
        x = layer(x, **kept)
    if name == "ModernBERT":  # of the second sentence half is padding
        x, seen = x[:1], [seen[0][:1]]
    torch.testing.assert_close(seen[0], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", encoder_families.FAMILIES, ids=name_of)
def test_the_page_says_what_a_family_does(family: model_families.Family) -> None:
    """`python -m bench.model_families` writes the page."""
    if compat.release("transformers") < (5, 24):
        pytest.skip("the page is that of transformers 5.24 and newer")
    found = model_families.row(family, encoder_families.examine(family))
    assert model_families.written(family) == found


def test_grids_are_refused_even_with_known_prefix() -> None:
    for name in ("mobilevit_xxs", "pit_ti_224", "crossvit_tiny_240"):
        model = timm.create_model(name)
        with pytest.raises(ValueError, match=GRID):
            tokred.patch(model, "tome", num_prefix=0)


@torch.no_grad()
def test_intermediate_features_of_timm() -> None:
    """Refused when they are asked for, as the model itself may be used otherwise."""
    model = timm_vit().eval()
    takes = (
        lambda: model.forward_intermediates(pixels()),
        lambda: model.forward_intermediates(pixels(), output_fmt="NLC", intermediates_only=True),
        lambda: model.get_intermediate_layers(pixels(), n=2, reshape=True),
    )
    plain = tensors(takes[0]())
    for take in takes:
        with (
            tokred.patch(model, "tome", r=4),
            pytest.raises(ValueError, match="restore_tokens=True"),
        ):
            take()
    with tokred.patch(model, "tome", r=0):
        assert all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(tensors(takes[0]()), plain, strict=True)
        )
    with tokred.patch(model, "tome", r=4, trace_source=True) as handle:
        features = handle.unmerge(model.forward_features(pixels()))
    with tokred.patch(model, "tome", r=4, restore_tokens=True):
        for _take in takes:
            assert all(x.isfinite().all() for x in tensors(_take()))
        grid, prefix = model.forward_intermediates(
            pixels(), indices=1, norm=True, return_prefix_tokens=True
        )[1][0]
    assert torch.equal(grid.flatten(2).transpose(1, 2), features[:, 1:])
    assert torch.equal(prefix, features[:, :1])
    hidden = timm_in_transformers().eval()
    with tokred.patch(hidden, "tome", r=2), pytest.raises(ValueError, match="restore_tokens=True"):
        hidden(pixels(), output_hidden_states=True)
