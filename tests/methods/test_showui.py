"""ShowUI's components and its share of each, patch by patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokred.methods._skipping import run_on
from tokred.methods.showui import ui_graph, ui_indices, ui_patches, ui_select


def components(patches: Tensor, threshold: float) -> list[int]:
    """The label of every patch of one screenshot, by growing regions."""
    height, width, _ = patches.shape
    label = [-1] * (height * width)
    count = 0
    for seed in range(height * width):
        if label[seed] >= 0:
            continue
        stack = [seed]
        label[seed] = count
        while stack:
            y, x = divmod(stack.pop(), width)
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < height and 0 <= u < width
                if not inside or label[v * width + u] >= 0:
                    continue
                if (patches[y, x].double() - patches[v, u].double()).norm() < threshold:
                    label[v * width + u] = count
                    stack.append(v * width + u)
        count += 1
    return label


def selected(labels: list[int], ratio: float) -> list[int]:
    kept = [i for i, label in enumerate(labels) if label < 0]
    for label in {*labels} - {-1}:
        members = [i for i, other in enumerate(labels) if other == label]
        c = len(members)
        n = max(1, c - round(c * ratio))
        kept += [members[i * (c - 1) // (n - 1) if n > 1 else 0] for i in range(n)]
    return sorted(kept)


def screenshot(batch: int, height: int, width: int, patch: int) -> Tensor:
    """Flat areas with a little noise: some neighbouring patches are nearly equal."""
    generator = torch.Generator().manual_seed(height * width)
    colours = torch.randn(3, 3, generator=generator)
    areas = torch.randint(3, (batch, height, width), generator=generator)
    image = colours[areas].permute(0, 3, 1, 2)
    image = image.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return image + 0.01 * torch.randn(image.shape, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(1, 7), (5, 6), (8, 3)])
def test_screenshots(height: int, width: int) -> None:
    patches = ui_patches(screenshot(2, height, width, 4), patch=4)
    assert patches.shape == (2, height, width, 3 * 16 * 2)
    labels = ui_graph(patches)
    for ratio in (0.0, 0.3, 0.5, 0.75, 1.0):
        keep = ui_select(labels, ratio)
        indices = ui_indices(labels, ratio)
        for item in range(2):
            assert labels[item].tolist() == components(patches[item], 1.0)
            expected = selected(labels[item].tolist(), ratio)
            assert keep[item].nonzero()[:, 0].tolist() == expected
            assert indices[item].tolist() == expected + [-1] * (height * width - len(expected))
        assert torch.equal(ui_select(labels[1:], ratio), keep[1:])


def test_patches() -> None:
    pixels = torch.randn(1, 3, 8, 12)
    patches = ui_patches(pixels, patch=4, frames=1)
    assert torch.equal(patches[0, 1, 2].view(3, 4, 4), pixels[0, :, 4:8, 8:12])
    distance = (patches[0, 0, 0] - patches[0, 0, 1]).norm()
    twice = ui_patches(pixels, patch=4)
    torch.testing.assert_close((twice[0, 0, 0] - twice[0, 0, 1]).norm(), distance * 2**0.5)


def test_text_and_large_components() -> None:
    labels = torch.tensor([[-1, 0, 0, -1, 0, 0, 0, 1, -1]], dtype=torch.int32)
    assert ui_select(labels).int().tolist() == [[1, 1, 0, 1, 1, 0, 1, 1, 1]]
    one = torch.zeros(1, 1000, dtype=torch.int32)
    for ratio in (0.1, 0.35, 0.5, 0.91):
        kept = ui_select(one, ratio)[0].nonzero()[:, 0].tolist()
        assert kept == selected([0] * 1000, ratio)
    assert ui_select(one[:, :0]).shape == (1, 0)


def test_skipped_tokens_pass_a_layer_by() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 9, 4).to(dtype).requires_grad_()
        indices = torch.tensor([[0, 3, 8], [2, 5, -1]], dtype=torch.int32)
        out = run_on(x, indices, lambda tokens, _: tokens * 3)
        factor = torch.ones(2, 9, 1)
        factor[0, [0, 3, 8]] = 3
        factor[1, [2, 5]] = 3
        torch.testing.assert_close(out, x * factor.to(dtype))
        out.float().sum().backward()
        torch.testing.assert_close(x.grad, factor.expand(2, 9, 4).to(dtype))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="multiples of 28, got"):
        ui_patches(torch.zeros(1, 3, 56, 30))
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 1.5"):
        ui_select(torch.zeros(1, 4, dtype=torch.int32), 1.5)
