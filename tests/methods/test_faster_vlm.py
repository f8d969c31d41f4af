"""FasterVLM against a sort of every row, and by the crops of an image."""

from __future__ import annotations

import pytest
import torch

import tokred
from cases.groups import check_in_a_model
from cases.selection import best_of, check_rows, padding, picked, uniform, visual_call
from cases.tiny_vlms import FAMILIES
from tokred.methods.faster_vlm import FasterVlmOptions, select_tokens


def transcription(attention: torch.Tensor, valid: list[int], k: int, order: str) -> list[int]:
    scores = attention.double().mean(0) if attention.dim() == 2 else attention.double()
    chosen = best_of(scores, k, valid)
    return sorted(chosen) if order == "position" else chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("k", [0, 1, 7, 50])
def test_picks(dtype: torch.dtype, order: str, k: int) -> None:
    """In bfloat16 many scores are equal."""
    attention = uniform(3, 4, 40).to(dtype)
    check_rows(
        lambda a, **options: select_tokens(a, **options), transcription, [attention],
        padding(3, 40), k=k, order=order,
    )  # fmt: skip
    check_rows(select_tokens, transcription, [attention[:, 0]], k=k, order=order)


def test_equal_scores_and_nan() -> None:
    assert select_tokens(torch.ones(1, 2, 9), 3).tolist() == [[0, 1, 2]]
    scores = torch.full((1, 4), torch.nan)
    scores[0, 2] = 1
    assert select_tokens(scores, 3).tolist() == [[2, -1, -1]]
    assert select_tokens(torch.rand(0, 2, 9), 3).shape == (0, 3)
    assert select_tokens(torch.rand(2, 2, 0), 3).tolist() == [[-1] * 3] * 2


def test_a_budget_for_every_row() -> None:
    found = select_tokens(uniform(2, 3, 9), torch.tensor([2, 12]))
    assert [len(picked(row)) for row in found] == [2, 9]


@pytest.mark.parametrize(("tiling", "keep"), [(None, 8), ((2, 2), 20), ((1, 3), 10)])
def test_every_crop_keeps_as_many(tiling: tuple[int, int] | None, keep: int) -> None:
    call = visual_call(tiling=tiling)
    crops = call.layout.num_crops
    kept = FasterVlmOptions(keep=keep).reduce_visual(call)
    attention = call.class_attention(-2).mean(1)
    for row in range(2):
        expected = []
        for crop in range(crops):
            places = (call.layout.crop == crop).nonzero()[:, 0].tolist()
            expected += best_of(attention[row], keep // crops, places)
        assert picked(kept[row]) == sorted(expected)


def test_without_a_class_token() -> None:
    call = visual_call(prefix=0)
    kept = FasterVlmOptions(ratio=0.26).reduce_visual(call)
    received = call.received_attention(-2).mean(1)
    assert torch.equal(kept, select_tokens(received, 6))


@torch.no_grad()
def test_in_an_encoder() -> None:
    """Each layer keeps the tokens of highest class attention among those that it has."""
    check_in_a_model("faster_vlm", dict(ratio=1.0), dict(ratio=0.5, at=[0, 1]), (37, 19, 10))
    check_in_a_model("faster_vlm", dict(keep=36), dict(keep=5), (37, 6))
    received = (36, 18, 9)
    check_in_a_model(
        "faster_vlm", dict(ratio=1.0), dict(ratio=0.5, at=[0, 1]), received, class_token=False,
        global_pool="avg",
    )  # fmt: skip


def test_refusals() -> None:
    with pytest.raises(ValueError, match="order must be"):
        select_tokens(torch.ones(1, 4), 2, order="best")
    with pytest.raises(ValueError, match="attention must be"):
        select_tokens(torch.ones(4), 2)
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        FasterVlmOptions(keep=0)


@pytest.mark.parametrize("name", ["faster_vlm", "hiprune"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@torch.no_grad()
def test_a_model_with_a_language_model_is_one_stack(name: str, family: str) -> None:
    """Its encoder, which needs all of its tokens, is not taken for one on its own."""
    found = next(one for one in FAMILIES if one.name == family)
    model = found.model()
    with tokred.patch(model, name, keep=4) as handle:
        model(**found.prompt((1,)))
        before, kept = handle.counts[0]
        assert len(handle.states) == 1 and kept < before
