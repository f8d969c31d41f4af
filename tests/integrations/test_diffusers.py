"""ToMe in diffusers' own models, where diffusers is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokred
from cases import torchvision_stub

torchvision_stub.install()
diffusers = pytest.importorskip("diffusers")

TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
UNET = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    layers_per_block=1,
    cross_attention_dim=16,
    norm_num_groups=8,
    attention_head_dim=8,
)
TRANSFORMER = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2)


def latent_of(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, height, width, generator=generator)


def sd1() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl() -> nn.Module:
    """Its first attention has half the latent's side."""
    return diffusers.UNet2DConditionModel(
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        **TRANSFORMER,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        norm_num_groups=1,
        patch_size=2,
    )


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        **TRANSFORMER, sample_size=16, norm_num_groups=1, patch_size=2
    )


def run_unet(model: nn.Module, latent: Tensor) -> Tensor:
    return model(latent, 3, encoder_hidden_states=TEXT).sample


def run_pixart(model: nn.Module, latent: Tensor) -> Tensor:
    conditions = {"resolution": None, "aspect_ratio": None}
    steps = torch.tensor([1, 1])
    return model(latent, TEXT, steps, added_cond_kwargs=conditions).sample


def run_dit(model: nn.Module, latent: Tensor) -> Tensor:
    return model(
        hidden_states=latent, timestep=torch.tensor([1, 1]), class_labels=torch.tensor([1, 2])
    ).sample


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    tokens: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
        return model


FAMILIES = (
    Family("sd1", sd1, run_unet, 256),
    Family("sdxl", sdxl, run_unet, 64),
    Family("pixart", pixart, run_pixart, 64),
    Family("dit", dit, run_dit, 64),
)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def finest(merged: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Tokens before and after the merge, of the blocks with most; all of them merge alike."""
    counts = sorted(set(merged.values()))
    assert all(before == after for before, after in counts[:-1])
    return counts[-1]


@torch.no_grad()
def test_merges_by_default(family: Family) -> None:
    model, latent = family.model(), latent_of(16, 16)
    plain = family.run(model, latent)
    for options in ({}, {"use_rand": False}, {"merge_mlp": True}):
        with tokred.patch(model, "tomesd", **options) as handle:
            merged = family.run(model, latent)
        assert finest(handle.merged) == (family.tokens, family.tokens // 2)
        assert merged.shape == plain.shape
        assert not torch.equal(merged, plain)
        assert torch.cosine_similarity(merged.flatten(), plain.flatten(), dim=0) > 0.8
    with tokred.patch(model, "tomesd", ratio=0.0):
        assert torch.equal(family.run(model, latent), plain)
    assert torch.equal(family.run(model, latent), plain)


@torch.no_grad()
@pytest.mark.parametrize("build", [sd1, sdxl])
@pytest.mark.parametrize("size", [(13, 13), (16, 10), (9, 15)])
def test_odd_latents(build: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    model = next(family for family in FAMILIES if family.build is build).model()
    with tokred.patch(model, "tomesd", merge_crossattn=True) as handle:
        assert run_unet(model, latent_of(*size)).shape == (2, 4, *size)
    before, after = finest(handle.merged)
    assert after == before - before // 2


def test_gradient_checkpointing(family: Family) -> None:
    model = family.model().train()
    latents = latent_of(16, 16), latent_of(16, 16, seed=1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # DiT drops labels
        sum(family.run(model, latent).square().sum() for latent in latents).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with tokred.patch(model, "tomesd"):
        expected = gradients()
        model.enable_gradient_checkpointing()
        for ours, theirs in zip(gradients(), expected, strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale)


def test_backward_with_checkpoints_belongs_inside_the_patch() -> None:
    model = sd1().train()
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    latent = latent_of(16, 16).requires_grad_()
    with tokred.patch(model, "tomesd"):
        loss = run_unet(model, latent).square().sum()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside"):
        loss.backward()
    assert latent.grad is None


@torch.no_grad()
def test_a_mask_over_the_latent_is_refused() -> None:
    model, mask = sd1().eval(), torch.ones(2, 256)
    with tokred.patch(model, "tomesd"), pytest.raises(ValueError, match="attention_mask"):
        model(latent_of(16, 16), 3, encoder_hidden_states=TEXT, attention_mask=mask)


@torch.no_grad()
def test_two_models_under_one() -> None:
    """A wrapper's forward has no latent: each model of diffusers in it has its own."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = sd1().eval(), sdxl().eval()

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            return run_unet(self.second, run_unet(self.first, inputs["latent"]))

    model = Both()
    with tokred.patch(model, "tomesd") as handle:
        model({"latent": latent_of(16, 16)})
        counts = [finest(state.merged) for state in handle.states]
    assert counts == [(256, 128), (64, 32)]


@pytest.mark.parametrize("name", ["UNet3DConditionModel", "PriorTransformer"])
def test_other_models_are_refused(name: str) -> None:
    options: dict[str, Any] = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)
    if name == "UNet3DConditionModel":
        down = ("CrossAttnDownBlock3D", "DownBlock3D")
        up = ("UpBlock3D", "CrossAttnUpBlock3D")
        options = {**UNET, "down_block_types": down, "up_block_types": up}
    model = getattr(diffusers, name)(**options)
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        tokred.patch(model, "tomesd")
