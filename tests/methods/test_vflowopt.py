"""VFlowOpt's entropy, importance and merging against loops over patches, tokens and cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases.groups import tokens_of
from cases.selection import picked, uniform, visual_call
from tokred.methods.vflowopt import (
    VflowoptOptions,
    importance,
    low_tokens,
    patch_entropy,
    recycle,
)
from tokred.patching import VisualCall


def test_entropy() -> None:
    pixels = uniform(2, 3, 8, 12).pow(2)
    pixels[1, :, :4, :4] = 0.25  # a patch of one colour
    found = patch_entropy(pixels, 4)
    for item in range(2):
        for row in range(2):
            for column in range(3):
                part = pixels[item, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                grey = ((part * 255).floor().sum(0) * 0.3333).round().flatten()
                share = torch.bincount(grey.long(), minlength=256).double() / 16
                expected = -(share * (share + 1e-10).log2()).sum().item()
                assert found[item, row * 3 + column].item() == pytest.approx(expected, abs=1e-4)
    assert found[1, 0].abs() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_importance(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 2, 4, 20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    entropy = uniform(2, 20) * 5
    found = importance(q, k, entropy, 0.9, 0.5)
    matrix = (q.double() @ k.double().mT / 8**0.5).softmax(-1).mean(1)
    for row in range(2):
        received = matrix[row].mean(0)
        strong = received > 0.9 * received.mean()
        expected = matrix[row][strong].mean(0) + 0.5 * entropy[row].double().softmax(0)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "ratio", "cell"),
    [((6, 8), 0.5, 4), ((5, 7), 0.3, 3), ((6, 8), 1.0, 9), ((4, 4), 0, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(grid: tuple[int, int], ratio: float, cell: int, dtype: torch.dtype) -> None:
    tokens = grid[0] * grid[1]
    x, scores = tokens_of(3, tokens).to(dtype), uniform(3, tokens) + 0.01
    scores[2] = scores[2].mul(5).round() + 1  # many alike
    done = recycle(x, scores, grid, ratio, cell)
    low = low_tokens(tokens, ratio, cell)
    for row in range(3):
        ascending = sorted(range(tokens), key=lambda i: scores[row, i].item())
        groups: dict[tuple[int, int], list[int]] = {}
        for i in sorted(ascending[:low]):
            groups.setdefault((i // grid[1] // cell, i % grid[1] // cell), []).append(i)
        expected = {i: [i] for i in ascending[low:]}
        for group in groups.values():
            expected[max(group, key=lambda i: scores[row, i].item())] = group
        places = sorted(expected)
        assert picked(done.positions[row]) == places and done.lengths[row] == len(places)
        for slot, place in enumerate(places):
            group = expected[place]
            weight = scores[row, group].double()
            mean = (weight[:, None] * x[row, group].double()).sum(0) / weight.sum()
            if len(group) == 1 and place in ascending[low:]:
                assert torch.equal(done.tokens[row, slot], x[row, place])
            slack = 1e-5 if dtype == torch.float32 else 1e-2
            found = done.tokens[row, slot].double()
            torch.testing.assert_close(found, mean, rtol=slack * 10, atol=slack)
            assert (done.token_map[row, group] == slot).all()
        alone = recycle(x[row : row + 1], scores[row : row + 1], grid, ratio, cell)
        assert torch.equal(alone.tokens[0], done.tokens[row])


def test_gradient() -> None:
    x = tokens_of(1, 12, 4).requires_grad_()
    recycle(x, uniform(1, 12) + 0.1, (3, 4), 0.5, 2).tokens.sum().backward()
    assert x.grad.abs().sum() > 0


def test_refusals() -> None:
    x = torch.ones(1, 6, 2)
    for words, call in (
        ("grid must have 6 tokens", lambda: recycle(x, torch.ones(1, 6), (2, 2))),
        ("ratio must be in", lambda: low_tokens(6, 1.5, 2)),
        ("cell must be at least 1", lambda: low_tokens(6, 0.5, 0)),
        ("pixels must be", lambda: patch_entropy(torch.ones(1, 3, 9, 8), 4)),
        ("pixels must be", lambda: patch_entropy(torch.ones(1, 1, 8, 8), 4)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def crop_importance(call: VisualCall, crop: int, row: int, mean: float) -> list[float]:
    """The published importance of the tokens of one crop, whose patches are its tokens."""
    q, k = (x[row, crop].double() for x in call.encoder.heads[2]())
    matrix = (q @ k.mT * 0.5).softmax(-1).mean(0)
    received = matrix.mean(0)[1:]
    strong = received > received.mean()
    side = call.pixels.shape[-1] // call.layout.crop_grid[1]
    pixels = (call.pixels[row, crop] * 0.5 + mean)[None]
    entropy = patch_entropy(pixels, side)[0].double()
    return (matrix[1:, 1:][strong].mean(0) + entropy.softmax(0)).tolist()


@pytest.mark.parametrize("tiling", [None, (1, 2)])
def test_an_image(tiling: tuple[int, int] | None) -> None:
    call = visual_call(tiling=tiling)
    (rows, columns), crops = call.layout.crop_grid, call.layout.num_crops
    count, keep = rows * columns, 9 * crops
    method = VflowoptOptions(keep=keep, mean=0.25)
    made = method.reduce_visual(call)
    cells = crops * 2
    for row in range(2):
        scores = [s for crop in range(crops) for s in crop_importance(call, crop, row, 0.25)]
        ascending = sorted(range(crops * count), key=scores.__getitem__)
        low = ascending[: crops * count - keep + cells]
        groups: dict[tuple[int, int], list[int]] = {}
        for i in sorted(low):
            groups.setdefault((i // count, i % count % columns // 4), []).append(i)
        expected = {i: [i] for i in range(crops * count) if i not in low}
        for group in groups.values():
            expected[max(group, key=scores.__getitem__)] = group
        places = sorted(expected)
        assert picked(made.indices[row]) == places and len(places) <= keep
        for slot, place in enumerate(places):
            weight = torch.tensor([scores[i] for i in expected[place]])
            mean = (call.tokens[row, expected[place]] * (weight / weight.sum())[:, None]).sum(0)
            torch.testing.assert_close(made.tokens[row, slot], mean, rtol=1e-4, atol=1e-5)
            assert all(made.token_map[row, i] == slot for i in expected[place])


def test_images_that_are_refused() -> None:
    call = visual_call()
    assert [picked(row) for row in VflowoptOptions(keep=1).reduce_visual(call).indices] != [[], []]
    with pytest.raises(ValueError, match="keep must be at least 1 for each of 3 crops, got 2"):
        VflowoptOptions(keep=2).reduce_visual(visual_call(tiling=(1, 2)))
    with pytest.raises(ValueError, match="vflowopt with an alpha reads the pixels"):
        VflowoptOptions(keep=9).reduce_visual(replace(call, pixels=None))
    assert VflowoptOptions(keep=9, alpha=0.0).reduce_visual(replace(call, pixels=None)) is not None
    assert VflowoptOptions(keep=24).reduce_visual(call) is None
    with pytest.raises(ValueError, match="vflowopt reads where in the image tokens are from"):
        VflowoptOptions(keep=9).reduce_visual(replace(call, layout=None))
    with pytest.raises(ValueError, match="cell must be at least 1, got 0"):
        VflowoptOptions(cell=0)
    with pytest.raises(ValueError, match='reduce must be "sum" or "mean" beside queries'):
        call.received_attention(queries=torch.ones(2, 24, dtype=torch.bool), reduce="max")
