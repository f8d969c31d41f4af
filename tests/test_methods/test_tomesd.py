"""ToMe for diffusion against the PyPI package tomesd, and in diffusers' blocks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import tokred
from tokred.methods.tomesd import ToMeSD, compute_merge, grid_destinations, random2d_plan


def tokens(height: int, width: int, channels: int = 12, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(batch, height * width, channels, generator=generator)


@pytest.mark.parametrize(
    ("grid", "strides", "ratio"),
    product(((8, 8), (7, 9), (1, 16)), ((2, 2), (1, 2), (3, 2)), (0.1, 0.5, 0.9)),
)
def test_same_as_the_package(grid: tuple[int, int], strides: tuple[int, int], ratio: float) -> None:
    """Equal after unmerging: the package's order inside the merged sequence depends on its sort."""
    oracle = pytest.importorskip("tomesd.merge")
    (height, width), (stride_y, stride_x) = grid, strides
    if height < stride_y:
        pytest.skip("the package divides by an empty set of destinations")
    metric = tokens(height, width)
    x = tokens(height, width, channels=5) + 1
    r = int(height * width * ratio)
    merge, unmerge = oracle.bipartite_soft_matching_random2d(
        metric, width, height, stride_x, stride_y, r, no_rand=True
    )
    token_map, num_out = random2d_plan(metric, height, width, r, stride_y, stride_x)
    merged, _ = tokred.merge(x, token_map, num_out)
    expected = merge(x)
    assert merged.shape == expected.shape
    torch.testing.assert_close(tokred.unmerge(merged, token_map), unmerge(expected))


def test_destinations_top_left() -> None:
    assert grid_destinations(4, 6).tolist() == [[0, 2, 4, 12, 14, 16]]
    assert grid_destinations(5, 5).tolist() == [[0, 2, 10, 12]]
    assert grid_destinations(1, 7, stride_y=1).tolist() == [[0, 2, 4]]
    assert grid_destinations(1, 4).shape == (1, 0)


def test_destinations_at_random() -> None:
    """One in every cell, every place in the cell taken somewhere, the same for the same seed."""
    draw = [grid_destinations(40, 60, 2, 3, torch.tensor(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    y, x = draw[0][0] // 60, draw[0][0] % 60
    cells = (y // 2) * 20 + x // 3
    assert torch.equal(cells, torch.arange(400).int())
    assert set(((y % 2) * 3 + x % 3).tolist()) == set(range(6))


def test_compute_merge() -> None:
    options = ToMeSD(ratio=0.5, use_rand=True)
    seed = torch.tensor(0)
    token_map, num_out = compute_merge(tokens(8, 6), (8, 6), options, seed)
    assert num_out == 24
    assert token_map.shape == (2, 48)
    assert compute_merge(tokens(4, 3), (8, 6), options, seed) is None
    deeper = ToMeSD(ratio=0.5, max_downsample=2)
    assert compute_merge(tokens(4, 3), (8, 6), deeper, seed)[1] == 6
    odd = tokens(8, 6, batch=3)
    top_left = random2d_plan(odd, 8, 6, 24)
    assert torch.equal(compute_merge(odd, (8, 6), options, seed)[0], top_left[0])
    assert compute_merge(odd, (8, 6), ToMeSD(ratio=0), seed) is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="4 x 4 of the grid"):
        random2d_plan(torch.zeros(1, 15, 4), 4, 4, 3)
    with pytest.raises(ValueError, match="ratio"):
        ToMeSD(ratio=1)
    with pytest.raises(ValueError, match="at least 1"):
        ToMeSD(stride_x=0)
    with pytest.raises(ValueError, match="BasicTransformerBlock"):
        tokred.patch(nn.Linear(2, 2), "tomesd")


class BasicTransformerBlock(nn.Module):
    """The parts of diffusers' block of that name that the patch relies on."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = nn.Linear(channels, channels)
        self.attn2 = None
        self.ff = nn.Linear(channels, channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        return hidden_states + self.ff(hidden_states)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(8)

    def forward(self, sample: Tensor) -> Tensor:
        hidden_states = self.block(sample.flatten(2).transpose(1, 2))
        return hidden_states.transpose(1, 2).reshape(sample.shape)


@torch.no_grad()
def test_patch_merges_around_the_attention() -> None:
    torch.manual_seed(0)
    model, latent = Denoiser(), torch.randn(2, 8, 6, 6)
    x = latent.flatten(2).transpose(1, 2)
    block = model.block
    token_map, num_out = random2d_plan(x.contiguous(), 6, 6, 18)
    merged, _ = tokred.merge(block.norm1(x), token_map, num_out)
    x = x + tokred.unmerge(block.attn1(merged), token_map)
    expected = (x + block.ff(x)).transpose(1, 2).reshape(latent.shape)
    plain = model(latent)
    with tokred.patch(model, "tomesd", ratio=0.5, use_rand=False):
        torch.testing.assert_close(model(sample=latent), expected)
    assert torch.equal(model(latent), plain)


@torch.no_grad()
def test_diffusers_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=8,
    ).eval()
    latent, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    plain = unet(latent, 3, text).sample
    seen = []
    hook = (
        unet.down_blocks[0]
        .attentions[0]
        .transformer_blocks[0]
        .attn1.to_q.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    )
    for options in ({}, {"use_rand": False}, {"merge_crossattn": True, "merge_mlp": True}):
        with tokred.patch(unet, "tomesd", ratio=0.5, **options):
            merged = unet(latent, 3, encoder_hidden_states=text).sample
        assert merged.shape == plain.shape
        assert not torch.equal(merged, plain)
        assert torch.cosine_similarity(merged.flatten(), plain.flatten(), dim=0) > 0.9
    hook.remove()
    assert seen == [128] * 3
    with tokred.patch(unet, "tomesd", ratio=0.0):
        assert torch.equal(unet(latent, 3, text).sample, plain)
    assert torch.equal(unet(latent, 3, text).sample, plain)
