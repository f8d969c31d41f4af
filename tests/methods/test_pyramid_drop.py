"""PyramidDrop's ranking and stages against the attention matrix, prompt by prompt."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from tokred.methods.pyramid_drop import (
    PyramidDropOptions,
    instruction_scores,
    pyramid_counts,
    pyramid_drop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_counts() -> None:
    assert pyramid_counts(576) == [288, 144, 72]
    assert pyramid_counts(2880) == [1440, 720, 360]
    assert pyramid_counts(7, 0.5, 4) == [3, 1, 0, 0]
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 0"):
        pyramid_counts(576, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_a_row_of_attention(dtype: torch.dtype) -> None:
    call = prompt_call(dtype=dtype)
    q, k = call.following()
    expected = attention_of(call, "following")[:, :, -1].mean(1).float()
    scores = instruction_scores(q[:, :, -1:], k, call.scale, call.valid)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_a_stage_keeps_the_best() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.5, torch.nan, 0.2], [1, 1, 1, 1, 1.0]])
    valid = torch.tensor([[True] * 5, [False, True, True, True, False]])
    assert pyramid_drop(scores, 2, valid).tolist() == [[1, 2], [1, 2]]
    assert pyramid_drop(scores, 4, order="score").tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert picks_of(pyramid_drop(scores, torch.tensor([1, 9]), valid)) == [[1], [1, 2, 3]]
    alone = pyramid_drop(scores[1:], 2, valid[1:])
    assert torch.equal(alone, pyramid_drop(scores, 2, valid)[1:])


@pytest.mark.parametrize("options", [{"ratio": 0.125}, {"keep": 5}, {"ratio": 1.0}])
def test_three_stages_in_a_prompt(options: dict) -> None:
    method = PyramidDropOptions(**options)
    assert method.prune_layers(32) == [8, 16, 24] and method.prune_layers(28) == [7, 14, 21]
    call = prompt_call(num_layers=32)
    for stage, layer in enumerate(method.prune_layers(32)):
        call.layer = layer
        row = attention_of(call, "following")[:, :, -1].mean(1).float()
        wanted = []
        for item, count in enumerate((24, 17, 0)):
            slots = [s for s in call.slots[item].tolist() if s >= 0]
            end = min(5, count) if "keep" in options else count * options["ratio"]
            left = int(count ** (1 - (stage + 1) / 3) * end ** ((stage + 1) / 3) + 1e-9)
            wanted.append(ranked(row[item, slots].tolist(), left))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)


def test_stages_of_other_models() -> None:
    assert PyramidDropOptions().prune_layers(3) == [1, 2]
    assert PyramidDropOptions().prune_layers(1) == []
    assert PyramidDropOptions(stages=(1, 5)).prune_layers(6) == [1, 5]
    with pytest.raises(ValueError, match="stages must be layers below 4, got 5"):
        PyramidDropOptions(stages=(1, 5)).prune_layers(4)
    for stages in ((), (3, 2), (2, 2), (-1,), [1], (1.0,)):
        with pytest.raises(ValueError, match="stages must be a tuple of ascending layers"):
            PyramidDropOptions(stages=stages)
