"""GlobalCom2 against interpolation and sorts row by row, and in the crops of an image."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.selection import best_of, picked, visual_call
from tokred.methods.globalcom2 import Globalcom2Options, crop_ratios, select_tokens, spread

GRID, TILING = (6, 8), (2, 3)


def transcription(
    logits: torch.Tensor,
    ratio: float,
    rows: range = range(12),
    columns: range = range(24),
    grid: tuple[int, int] = GRID,
    tiling: tuple[int, int] = TILING,
) -> list[int]:
    """The picks of one image, whose stitched crops are padding outside of the rows and columns."""
    (height, width), places = grid, grid[0] * grid[1]
    logits = logits.double()
    thumbnail = logits[0].view(height, width)
    sums = []
    for i in range(tiling[0]):
        for j in range(tiling[1]):
            bottom = height if i == tiling[0] - 1 else (i + 1) * (height // tiling[0])
            right = width if j == tiling[1] - 1 else (j + 1) * (width // tiling[1])
            part = thumbnail[i * (height // tiling[0]) : bottom, j * (width // tiling[1]) : right]
            sums.append(part.sum())
    weight = (torch.stack(sums) / 10).softmax(0)
    ratios = (ratio * (1 + weight - weight.mean())).clamp(max=1)
    size = len(rows), len(columns)
    inner = functional.interpolate(thumbnail[None, None], size, mode="bilinear")[0, 0]
    stitched = torch.zeros(height * tiling[0], width * tiling[1], dtype=torch.float64)
    stitched[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inner
    picks = best_of(logits[0], int(places * ratio), range(places))
    for crop in range(tiling[0] * tiling[1]):
        i, j = divmod(crop, tiling[1])
        there = [
            r * width + c
            for r in range(height)
            for c in range(width)
            if i * height + r in rows and j * width + c in columns
        ]
        if not there:
            continue
        part = stitched[i * height : (i + 1) * height, j * width : (j + 1) * width].flatten()
        scores = torch.zeros(places, dtype=torch.float64)
        for value in (logits[crop + 1], part):
            scores[there] += functional.normalize(value[there], dim=0)
        kept = best_of(scores, int(len(there) * ratios[crop]), there)
        picks += [(crop + 1) * places + p for p in sorted(kept)]
    return picks


def in_crops(rows: range, columns: range) -> torch.Tensor:
    """bool [1 + crops, P] of stitched rows and columns; the thumbnail is whole."""
    stitched = torch.zeros(12, 24, dtype=torch.bool)
    stitched[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    crops = stitched.view(2, 6, 3, 8).transpose(1, 2).reshape(6, 48)
    return torch.cat([torch.ones(1, 48, dtype=torch.bool), crops])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
def test_picks(ratio: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 48) * 3
    areas = [(range(12), range(24)), (range(2, 10), range(24)), (range(12), range(5, 19))]
    valid = torch.stack([in_crops(*area) for area in areas])
    found = select_tokens(logits, ratio, GRID, TILING, valid)
    assert found.shape == (3, int(48 * ratio) + int(288 * ratio + 1e-6))
    for row, area in enumerate(areas):
        assert picked(found[row]) == transcription(logits[row], ratio, *area)
        one = slice(row, row + 1)
        alone = select_tokens(logits[one], ratio, GRID, TILING, valid[one])
        assert torch.equal(alone[0], found[row])
    assert torch.equal(select_tokens(logits[:1], ratio, GRID, TILING)[0], found[0])


def test_shares_and_map() -> None:
    """The sum of the ratios is the same whatever the logits; the map is that of interpolate."""
    torch.manual_seed(1)
    thumbnail = torch.randn(2, 48)
    ratios = crop_ratios(thumbnail, GRID, TILING, 0.25)
    torch.testing.assert_close(ratios.mean(1), torch.full((2,), 0.25, dtype=torch.float64))
    whole = spread(thumbnail, GRID, TILING, torch.ones(2, 6, 48, dtype=torch.bool))
    image = functional.interpolate(thumbnail.view(2, 1, 6, 8), (12, 24), mode="bilinear")
    expected = image.view(2, 2, 6, 3, 8).transpose(2, 3).reshape(2, 6, 48)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


def test_in_crops() -> None:
    call = visual_call(crop_grid=GRID, tiling=TILING)
    kept = Globalcom2Options(ratio=0.25).reduce_visual(call)
    logits = call.class_attention(-1, softmax=False).mean(1).view(2, 7, 48)
    for row in range(2):
        assert picked(kept[row]) == transcription(logits[row], 0.25)
    one = visual_call()
    found = Globalcom2Options(keep=5).reduce_visual(one)
    logits = one.class_attention(-1, softmax=False).mean(1)
    assert picked(found[0]) == best_of(logits[0], 5, range(24))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"logits must be \[B, 7, 48\]"):
        select_tokens(torch.ones(1, 6, 48), 0.25, GRID, TILING)
    with pytest.raises(ValueError, match="ratio must be in"):
        select_tokens(torch.ones(1, 7, 48), 1.5, GRID, TILING)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Globalcom2Options(temperature=0.0)
    with pytest.raises(ValueError, match="the vision encoder has none"):
        Globalcom2Options().reduce_visual(visual_call(prefix=0))
