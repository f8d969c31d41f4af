"""HiPrune against sets of positions in plain Python, and in the crops of an image."""

from __future__ import annotations

import pytest
import torch

from cases.groups import check_in_a_model
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from tokred.methods.hiprune import HipruneOptions, select_tokens

GRID = (7, 8)


def transcription(
    middle: torch.Tensor,
    deep: torch.Tensor,
    valid: list[int],
    k: int,
    alpha: float,
    grid: tuple[int, int] = GRID,
    reference_compat: bool = False,
) -> list[int]:
    middle, deep = middle.double().mean(0), deep.double().mean(0)
    height, width = grid
    near: set[int] = set()
    for anchor in best_of(middle, round(k * alpha / 5), valid):
        row, column = divmod(anchor, width)
        if reference_compat:
            steps = (0, -1, 1, -width, width)
            near |= {min(max(anchor + s, 0), height * width - 1) for s in steps}
        else:
            cross = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
            places = [(row + i, column + j) for i, j in cross]
            near |= {i * width + j for i, j in places if 0 <= i < height and 0 <= j < width}
    near &= set(valid)
    first = best_of(deep, k, sorted(near))
    rest = [i for i in valid if i not in near]
    return sorted(first + best_of(deep, k - len(first), rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference_compat", [False, True])
@pytest.mark.parametrize(("k", "alpha"), [(0, 0.1), (20, 0.1), (20, 0.8), (12, 1.0), (60, 0.3)])
def test_picks(dtype: torch.dtype, reference_compat: bool, k: int, alpha: float) -> None:
    maps = [uniform(3, 4, 56, seed=i).to(dtype) for i in range(2)]

    def select(middle: torch.Tensor, deep: torch.Tensor, **options: object) -> torch.Tensor:
        return select_tokens(middle, deep, options.pop("k"), GRID, **options)

    options = dict(k=k, alpha=alpha, reference_compat=reference_compat)
    valid = None if reference_compat else padding(3, 56)
    check_rows(select, transcription, maps, valid, **options)


def test_neighbours_stay_in_their_row() -> None:
    middle, deep = torch.zeros(2, 1, 56)
    middle[0, 15] = 1  # the last of its row
    deep = deep + torch.linspace(0.1, 0, 56)
    near = {7, 14, 15, 23}
    assert set(picked(select_tokens(middle, deep, 4, GRID, alpha=1.0)[0])) == near
    compat = select_tokens(middle, deep, 5, GRID, alpha=1.0, reference_compat=True)
    assert set(picked(compat[0])) == near | {16}


def test_a_budget_for_every_row() -> None:
    maps = uniform(2, 2, 56)
    found = select_tokens(maps, maps + 1, torch.tensor([10, 20]), GRID, alpha=1.0)
    for row, k in enumerate((10, 20)):
        alone = select_tokens(maps[row, None], maps[row, None] + 1, k, GRID, alpha=1.0)
        assert picked(found[row]) == picked(alone[0])


def test_in_crops() -> None:
    call = visual_call(tiling=(1, 2))
    options = HipruneOptions(keep=33, alpha=0.9, middle_layer=0)
    kept = options.reduce_visual(call)
    middle, deep = call.received_attention(0), call.received_attention(-2)
    for row in range(2):
        expected = []
        for crop in range(3):
            part = slice(crop * 24, crop * 24 + 24)
            inside = [m[row, :, part] for m in (middle, deep)]
            picks = transcription(*inside, [*range(24)], 11, 0.9, (4, 6))
            expected += [i + crop * 24 for i in picks]
        assert picked(kept[row]) == expected
    assert HipruneOptions().encoder_layers(24) == [8, -2]


@torch.no_grad()
def test_in_an_encoder() -> None:
    options = dict(middle_layer=0, deep_layer=1, alpha=1.0)
    check_in_a_model("hiprune", dict(ratio=1.0), dict(ratio=0.5, **options), (37, 19))
    with pytest.raises(ValueError, match="middle_layer must come before deep_layer"):
        HipruneOptions(middle_layer=5, deep_layer=2).layers(12)


def test_refusals() -> None:
    maps = torch.ones(1, 56)
    with pytest.raises(ValueError, match="grid must have 56 tokens, got 5 x 8"):
        select_tokens(maps, maps, 5, (5, 8))
    with pytest.raises(ValueError, match="alpha must be in"):
        select_tokens(maps, maps, 5, GRID, alpha=2)
    with pytest.raises(ValueError, match="middle must be"):
        select_tokens(torch.ones(4), maps, 5, GRID)
    with pytest.raises(ValueError, match="alpha must be in"):
        HipruneOptions(alpha=-1)
    with pytest.raises(ValueError, match="middle_layer must be one of 4 layers, got 8"):
        HipruneOptions(middle_layer=8).encoder_layers(4)
