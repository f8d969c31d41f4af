"""Visual tokens by crops, padding left out; and every method that may keep all of them."""

from __future__ import annotations

import pytest
import torch

from cases.selection import picked, uniform, visual_call
from tokred.methods import METHODS, Method, _crops, faster_vlm
from tokred.patching import Layout, VisualCall, VisualTokens


def stitched(batch: int = 2) -> VisualCall:
    """A thumbnail of 4 x 6, and two crops side by side whose lowest row is padding.

    The tokens of the crops are in the order of the image: the rows of both.
    """
    call = visual_call(batch, (4, 6), (1, 2))
    crop, place = [0] * 24, [*range(24)]
    for row in range(3):
        for column in range(12):
            crop.append(1 + column // 6)
            place.append(row * 6 + column % 6)
    layout = Layout(torch.tensor(crop).int(), torch.tensor(place).int(), (4, 6), (1, 2))
    return VisualCall(call.tokens[:, : len(crop)], layout)


def test_crops_of_a_padded_image() -> None:
    call = stitched()
    crops, tokens = _crops.crops_of(call), call.tokens.shape[1]
    assert crops.number == 3 and crops.token.shape == (3, 24)
    position = torch.arange(tokens)[None].repeat(2, 1)
    values, valid = crops.values(position).view(2, 3, 24), crops.valid(2).view(2, 3, 24)
    assert valid.sum((0, 2)).tolist() == [48, 36, 36]
    for n in range(tokens):
        crop, place = int(call.layout.crop[n]), int(call.layout.place[n])
        assert (values[:, crop, place] == n).all() and valid[:, crop, place].all()
    assert torch.equal(crops.spread(crops.values(position), tokens), position)
    picks = torch.tensor([[0, 23], [6, 1], [20, -1], [3, 2], [0, -1], [1, 0]], dtype=torch.int32)
    expected = [[0, 23, 36, 25], [3, 2, 24, 31, 30]]
    assert [picked(row) for row in crops.tokens(picks, "score")] == expected
    assert [picked(row) for row in crops.tokens(picks)] == [sorted(row) for row in expected]


def test_every_crop_keeps_its_part() -> None:
    call, scores = stitched(), uniform(2, 60)
    kept = _crops.select_in_crops(call, 17, faster_vlm.select_tokens, scores)
    for row in range(2):
        expected = []
        for crop in range(3):
            here = (call.layout.crop == crop).nonzero()[:, 0].tolist()
            expected += sorted(here, key=lambda i: -scores[row, i].item())[:5]
        assert picked(kept[row]) == sorted(expected)
    assert _crops.select_in_crops(call, 60, faster_vlm.select_tokens, scores) is None


def test_an_unknown_layout_is_one_crop() -> None:
    call = VisualCall(torch.randn(1, 9, 4))
    assert _crops.crops_of(call).token.tolist() == [[*range(9)]]


CHOOSING = [
    method
    for method in METHODS.values()
    if hasattr(method.options, "reduce_visual") and hasattr(method.options, "keep")
]


@pytest.mark.parametrize("method", CHOOSING, ids=lambda method: method.name)
@pytest.mark.parametrize("tiling", [None, (2, 2)])
def test_all_tokens_stay_as_they_are(method: Method, tiling: tuple[int, int] | None) -> None:
    """A budget of as many tokens as there are, or more, changes nothing, their order neither."""
    call = visual_call(tiling=tiling, crop_grid=(4, 4))
    kept = method.options(keep=10**6).reduce_visual(call)
    if isinstance(kept, VisualTokens):
        torch.testing.assert_close(kept.tokens, call.tokens)
        kept = kept.indices
    assert kept is None or kept.tolist() == [[*range(call.tokens.shape[1])]] * 2
