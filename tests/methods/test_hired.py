"""HiRED against counts and sorts in plain Python, and in the crops of an image."""

from __future__ import annotations

import pytest
import torch

from cases.selection import best_of, picked, uniform, visual_call
from tokred.methods.hired import HiredOptions, crop_budgets, select_tokens

GRID, TILING = (6, 8), (2, 2)


def transcription(
    early: torch.Tensor,
    deep: torch.Tensor,
    valid: torch.Tensor,
    k: int,
    alpha: float,
    reference_compat: bool = False,
) -> list[int]:
    (height, width), (rows, columns), places = GRID, TILING, early.shape[0]
    full = min(int(k * alpha), places)
    rest = min(k - full, rows * columns * places)
    here = [v.nonzero()[:, 0].tolist() for v in valid]
    counts = [0] * (rows * columns)
    for i in best_of(early, int(places * (1 - alpha)), here[0]):
        row, column = divmod(i, width)
        quadrant = row // (height // rows) * columns + column // (width // columns)
        counts[i // (places // len(counts)) if reference_compat else quadrant] += 1
    picks = best_of(deep[0], full, here[0])
    picks.sort()
    for crop, count in enumerate(counts, 1):
        share = count * rest // sum(counts) if sum(counts) else rest // len(counts)
        picks += [crop * places + i for i in sorted(best_of(deep[crop], share, here[crop]))]
    return picks[:k]


@pytest.mark.parametrize("reference_compat", [False, True])
@pytest.mark.parametrize(("k", "alpha"), [(0, 0.5), (48, 0.5), (48, 0.2), (60, 1.0), (300, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picks(reference_compat: bool, k: int, alpha: float, dtype: torch.dtype) -> None:
    early, deep = uniform(3, 48).to(dtype), uniform(3, 5, 48, seed=1).to(dtype)
    valid = uniform(3, 5, 48, seed=2) < 0.9
    valid[0] = True
    options = dict(alpha=alpha, reference_compat=reference_compat)
    found = select_tokens(early, deep, k, GRID, TILING, valid, **options)
    assert found.shape == (3, k)
    for row in range(3):
        expected = transcription(early[row], deep[row], valid[row], k, **options)
        assert picked(found[row]) == expected
        one = slice(row, row + 1)
        alone = select_tokens(early[one], deep[one], k, GRID, TILING, valid[one], **options)
        assert torch.equal(alone[0], found[row])


def test_a_quadrant_or_a_band() -> None:
    """All attention lies in the upper left of the thumbnail."""
    early = torch.zeros(1, 6, 8)
    early[:, :3, :4] = 1
    sizes = torch.full((1, 5), 48)
    quadrant = crop_budgets(early.flatten(1), 40, GRID, TILING, sizes, 0.75)
    assert quadrant.tolist() == [[30, 10, 0, 0, 0]]
    band = crop_budgets(early.flatten(1), 40, GRID, TILING, sizes, 0.75, True)
    assert band.tolist() == [[30, 6, 3, 0, 0]]


def test_in_crops() -> None:
    call = visual_call(crop_grid=GRID, tiling=TILING)
    kept = HiredOptions(ratio=0.2).reduce_visual(call)
    early, late = (call.class_attention(layer).mean(1).view(2, 5, 48) for layer in (0, -2))
    for row in range(2):
        valid = torch.ones(5, 48, dtype=torch.bool)
        assert picked(kept[row]) == transcription(early[row, 0], late[row], valid, 48, 0.5)
    one = visual_call()
    assert HiredOptions(keep=5).reduce_visual(one).shape == (2, 5)
    assert HiredOptions().encoder_layers(24) == [0, -2]


def test_refusals() -> None:
    early, deep = torch.ones(1, 48), torch.ones(1, 5, 48)
    with pytest.raises(ValueError, match=r"deep must be \[B, 5, 48\]"):
        select_tokens(early, deep[:, :4], 9, GRID, TILING)
    with pytest.raises(ValueError, match="alpha must be in"):
        select_tokens(early, deep, 9, GRID, TILING, alpha=2.0)
    with pytest.raises(ValueError, match="alpha must be in"):
        HiredOptions(alpha=-1.0)
    with pytest.raises(ValueError, match="tiling must divide the 48 tokens"):
        select_tokens(early, torch.ones(1, 6, 48), 9, GRID, (1, 5), reference_compat=True)
