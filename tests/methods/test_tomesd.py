"""ToMe for diffusion against the PyPI package tomesd, and in diffusers' blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokred
from tokred.methods.tomesd import (
    TomesdOptions,
    block_seed,
    compute_merge,
    grid_destinations,
    grid_of,
    random2d_plan,
)


def tokens(height: int, width: int, channels: int = 12, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(batch, height * width, channels, generator=generator)


@pytest.mark.parametrize(
    ("grid", "strides", "ratio"),
    [
        (grid, strides, ratio)
        for grid in ((8, 8), (7, 9), (1, 16))
        for strides in ((2, 2), (1, 2), (3, 2))
        for ratio in (0.1, 0.5, 0.9)
        if strides[0] <= grid[0]  # else the package divides by an empty set of destinations
    ],
)
def test_same_as_the_package(grid: tuple[int, int], strides: tuple[int, int], ratio: float) -> None:
    """Equal after unmerging: the package's order inside the merged sequence depends on its sort."""
    oracle = pytest.importorskip("tomesd.merge")
    (height, width), (stride_y, stride_x) = grid, strides
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
    options = TomesdOptions(ratio=0.5, use_rand=True)
    seed = torch.tensor(0)
    token_map, num_out = compute_merge(tokens(8, 6), (8, 6), options, seed)
    assert num_out == 24
    assert token_map.shape == (2, 48)
    assert compute_merge(tokens(4, 3), (8, 6), options, seed) is None
    deeper = TomesdOptions(ratio=0.5, max_downsample=2)
    assert compute_merge(tokens(4, 3), (8, 6), deeper, seed)[1] == 6
    odd = tokens(8, 6, batch=3)
    top_left = random2d_plan(odd, 8, 6, 24)
    assert torch.equal(compute_merge(odd, (8, 6), options, seed)[0], top_left[0])
    assert compute_merge(odd, (8, 6), TomesdOptions(ratio=0), seed) is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="4 x 4 of the grid"):
        random2d_plan(torch.zeros(1, 15, 4), 4, 4, 3)
    with pytest.raises(ValueError, match="ratio"):
        TomesdOptions(ratio=1)
    with pytest.raises(ValueError, match="at least 1"):
        TomesdOptions(stride_x=0)
    with pytest.raises(ValueError, match="must be True"):
        TomesdOptions(merge_attn=False)
    with pytest.raises(ValueError, match="BasicTransformerBlock"):
        tokred.patch(nn.Linear(2, 2), "tomesd")
    with pytest.raises(ValueError, match="BasicTransformerBlock"):
        tokred.patch(denoiser(), "tomesd", merge_attn=False, merge_crossattn=True)
    with pytest.raises(ValueError, match="7 x 5"):
        grid_of(23, (7, 5))
    model = denoiser()
    with tokred.patch(model, "tomesd") as handle:
        with pytest.raises(RuntimeError, match="no forward pass"):
            _ = handle.merged
        with pytest.raises(ValueError, match=r"sample must be a latent .*2, 8, 4, 4, 4"):
            model(torch.zeros(2, 8, 4, 4, 4))
        with pytest.raises(RuntimeError, match="outside of its model"):
            model.block(torch.zeros(2, 16, 8))
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="leave the patch first"):
                make(model)


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
    """Blocks on a latent of which every token covers a square of pixels; sides are rounded up."""

    def __init__(self, square: int = 1, blocks: int = 1, checkpointed: Any = None) -> None:
        super().__init__()
        self.square, self.checkpointed = square, checkpointed
        self.blocks = nn.ModuleList(BasicTransformerBlock(8) for _ in range(blocks))

    @property
    def block(self) -> BasicTransformerBlock:
        return self.blocks[0]

    def forward(self, sample: Tensor) -> Tensor:
        grid = nn.functional.avg_pool2d(sample, self.square, ceil_mode=True)
        hidden_states = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.checkpointed is None:
                hidden_states = block(hidden_states)
            else:
                hidden_states = checkpoint(block, hidden_states, use_reentrant=self.checkpointed)
        return hidden_states.transpose(1, 2).reshape(grid.shape)


def denoiser(**options: Any) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(**options)


def latent_of(height: int, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, height, width, generator=generator)


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


def test_grids() -> None:
    """Sides rounded up, as convolutions with padding do, or down, as patches do."""
    assert grid_of(256, (16, 16)) == (1, 16, 16)
    assert grid_of(64, (15, 15)) == (2, 8, 8)
    assert grid_of(49, (15, 15)) == (2, 7, 7)
    assert grid_of(4 * 7, (15, 27)) == (4, 4, 7)
    assert grid_of(3 * 6, (15, 27)) == (5, 3, 6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("square", "side", "tokens"),
    [
        (1, (16, 16), 256),
        (2, (16, 16), 64),
        (2, (15, 15), 64),
        (2, (15, 10), 40),
        (4, (32, 16), 32),
    ],
)
def test_the_finest_blocks_merge(square: int, side: tuple[int, int], tokens: int) -> None:
    """The default, whatever the latent's size is divided by before the first block."""
    model = denoiser(square=square, blocks=2)
    seen = []
    model.block.attn1.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with tokred.patch(model, "tomesd", ratio=0.5) as handle:
        out = model(latent_of(*side))
    names = ("blocks.0", "blocks.1")
    assert handle.merged == dict.fromkeys(names, (tokens, tokens - tokens // 2))
    assert seen == [(2, tokens - tokens // 2, 8)]
    assert out.isfinite().all()


@torch.no_grad()
def test_max_downsample_counts_from_the_finest_block() -> None:
    x = tokens(4, 4)
    for finest, most, merges in ((1, 1, False), (1, 2, True), (2, 1, True), (4, 1, True)):
        options = TomesdOptions(max_downsample=most)
        assert (compute_merge(x, (8, 8), options, finest=finest) is not None) == merges

    class UShaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(BasicTransformerBlock(8) for _ in range(3))

        def forward(self, sample: Tensor) -> Tensor:
            for block, square in zip(self.blocks, (2, 4, 2), strict=True):
                grid = nn.functional.avg_pool2d(sample, square)
                block(grid.flatten(2).transpose(1, 2))
            return sample

    model = UShaped()
    with tokred.patch(model, "tomesd") as handle:
        model(latent_of(16, 16))
        assert list(handle.merged.values()) == [(64, 32), (16, 16), (64, 32)]
    with tokred.patch(model, "tomesd", max_downsample=2) as handle:
        model(latent_of(16, 16))
        assert list(handle.merged.values()) == [(64, 32), (16, 8), (64, 32)]


@torch.no_grad()
def test_merging_nothing_warns_once() -> None:
    model = denoiser()
    with tokred.patch(model, "tomesd", ratio=0.1):
        with pytest.warns(RuntimeWarning, match=r"merged nothing: .*2 x 3 .*\[6\] tokens"):
            model(latent_of(2, 3))
        model(latent_of(2, 3))
    with tokred.patch(model, "tomesd", ratio=0.0):
        model(latent_of(2, 3))


@torch.no_grad()
def test_draws() -> None:
    """The same for the same seed, block and tokens, otherwise others; never from torch's RNG."""
    x = tokens(16, 16)
    changed = x.clone()
    changed[0, 0, 0] += 1e-3
    cases = [(x, 0, 0), (x, 1, 0), (x, 0, 1), (changed, 0, 0), (x, 2**63, 0), (x.half(), 0, 0)]
    model, latents = denoiser(), [latent_of(16, 16, seed=seed) for seed in (0, 1, 0)]
    before = torch.get_rng_state()
    draws = [grid_destinations(16, 16, seed=block_seed(*case)) for case in cases]
    again = grid_destinations(16, 16, seed=block_seed(x.clone(), 0, 0))
    assert torch.equal(again, draws[0])
    assert len({tuple(draw[0].tolist()) for draw in draws}) == len(cases)
    with tokred.patch(model, "tomesd", seed=0):
        first = [model(latent) for latent in latents]
    with tokred.patch(model, "tomesd", seed=1):
        other = model(latents[0])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], other)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_uniform() -> None:
    """In 400 grids each place of a cell is drawn about equally often."""
    draws = torch.cat([grid_destinations(8, 12, 2, 3, seed=torch.tensor(s)) for s in range(400)])
    places = (draws // 12 % 2) * 3 + draws % 12 % 3
    shares = torch.stack([(places == place).float().mean(0) for place in range(6)])
    assert (shares - 1 / 6).abs().max() < 4 * (1 / 6 * 5 / 6 / 400) ** 0.5


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_run_again_draw_the_same(reentrant: bool) -> None:
    """Two passes with as many tokens but other sides, before either is differentiated."""
    latents = [latent_of(12, 8).requires_grad_(), latent_of(8, 12).requires_grad_()]
    model = denoiser(square=1, blocks=3)

    def run() -> Tensor:
        return torch.cat([model(latent).flatten() for latent in latents])

    with tokred.patch(model, "tomesd"):
        expected = gradients(model, run)
        model.checkpointed = reentrant
        for ours, theirs in zip(gradients(model, run), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        model.checkpointed = None
        whole = partial(checkpoint, model, latents[0], use_reentrant=reentrant)
        expected = gradients(model, lambda: model(latents[0]))
        for ours, theirs in zip(gradients(model, whole), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_run_again_is_refused() -> None:
    model = denoiser()
    latent = latent_of(8, 8).requires_grad_()
    attend = model.block.attn1.forward
    with tokred.patch(model, "tomesd"):
        plain = type(model.block.attn1)

        class Checkpointed(plain):
            def __call__(self, x: Tensor) -> Tensor:
                return checkpoint(super().__call__, x, use_reentrant=False)

        model.block.attn1.__class__ = Checkpointed
        loss = model(latent).sum()
        with pytest.raises(RuntimeError, match="a part of a block was run again"):
            loss.backward()
        model.block.attn1.__class__ = plain
    assert model.block.attn1.forward == attend


@torch.no_grad()
def test_threads_share_one_model() -> None:
    model = denoiser(blocks=3)
    latents = [latent_of(8 + 2 * (seed % 4), 6 + 2 * (seed % 3), seed=seed) for seed in range(16)]
    with tokred.patch(model, "tomesd") as handle:

        def run(latent: Tensor) -> tuple[Tensor, dict]:
            return model(latent), handle.merged

        alone = list(map(run, latents))
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, latents))
    for (output, merged), theirs in zip(alone, together, strict=True):
        assert torch.equal(output, theirs[0])
        assert merged == theirs[1]


@torch.no_grad()
def test_passes_inside_one_another_and_after_an_exception() -> None:
    model = denoiser(blocks=2)
    outer, inner = latent_of(8, 8), latent_of(6, 10, seed=1)
    running = []
    with tokred.patch(model, "tomesd"):
        expected = model(outer), model(inner)

        def run_inside(*_: Any) -> None:
            if not running:
                running.append(True)
                assert torch.equal(model(inner), expected[1])

        hook = model.block.register_forward_hook(run_inside)
        assert torch.equal(model(outer), expected[0])
        hook.remove()
        stop = model.block.ff.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(inner)
        stop.remove()
        assert torch.equal(model(outer), expected[0])


@torch.no_grad()
def test_the_innermost_patch_counts() -> None:
    model, latent = denoiser(), latent_of(8, 8)
    with tokred.patch(model, "tomesd", ratio=0.25) as outer:
        few = model(latent)
        with tokred.patch(model, "tomesd", ratio=0.5, merge_mlp=True) as inner:
            many = model(latent)
            assert inner.merged == {"blocks.0": (64, 32)}
        assert torch.equal(model(latent), few)
        assert outer.merged == {"blocks.0": (64, 48)}
    with tokred.patch(model, "tomesd", ratio=0.5, merge_mlp=True):
        assert torch.equal(model(latent), many)


@torch.no_grad()
def test_compiles_to_one_graph() -> None:
    model, graphs = denoiser(blocks=2), []
    torch._dynamo.reset()

    def backend(module: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with tokred.patch(model, "tomesd"):
        for seed in range(4):
            latent = latent_of(8, 8, seed=seed)
            assert torch.equal(compiled(latent), model(latent))
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, latent = denoiser().to(dtype), latent_of(8, 8).to(dtype)
    plain = model(latent)
    with tokred.patch(model, "tomesd") as handle:
        merged = model(latent)
    assert handle.merged == {"blocks.0": (64, 32)}
    assert merged.dtype == dtype
    assert torch.cosine_similarity(merged.flatten().float(), plain.flatten().float(), dim=0) > 0.8
