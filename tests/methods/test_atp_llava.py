"""ATP-LLaVA's scores against attention matrices, and its rule token by token."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import attention_of, picks_of, prompt_call
from tokred.methods.atp_llava import (
    atp_llava,
    cross_scores,
    self_scores,
    spatial_scores,
    thresholds,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_scores_are_column_means_of_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 11, 8, generator=generator).to(dtype)
    k = torch.randn(2, 2, 11, 8, generator=generator).to(dtype)
    logits = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    expected = logits.mean((1, 2)).float()
    torch.testing.assert_close(self_scores(q, k), expected, rtol=1e-4, atol=1e-5)
    valid = torch.tensor([[True] * 11, [False] * 4 + [True] * 7])
    got = self_scores(q, k, valid=valid)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    among = logits[1, :, 4:, 4:].mean((0, 1)).float()
    torch.testing.assert_close(got[1, 4:], among, rtol=1e-4, atol=1e-5)
    assert not got[1, :4].any()


def test_cross_scores_are_column_means_of_attention() -> None:
    call = prompt_call()
    matrix, (q, k) = attention_of(call, "previous"), call.previous()
    got = cross_scores(q, k, call.after_images, call.scale, call.valid)
    for row, text in enumerate(call.after_images):
        expected = matrix[row][:, text].mean((0, 1)).float()
        torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-5)


def test_spatial_scores() -> None:
    grid = spatial_scores((5, 4), (4, 2)).view(5, 4)
    coarse, fine = 1 - 3 / 16, 1 - 3 / 4
    assert grid[0].tolist() == grid[4].tolist() == [coarse, 0, fine, 0]
    assert grid[2].tolist() == [fine, 0, fine, 0] and not grid[1].any() and not grid[3].any()
    assert spatial_scores((2, 2), (1,), weight=0.5).tolist() == [0.5] * 4
    with pytest.raises(ValueError, match=r"strides\[1\] must be at least 1, got 0"):
        spatial_scores((4, 4), (2, 0))


def test_thresholds() -> None:
    own, cross = torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(1))
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 3.0]]), torch.tensor([0.1, -0.2])
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    first, second = thresholds(own, cross, weight, bias, valid)
    for row, count in enumerate((6, 2)):
        means = own[row, :count].mean(), cross[row, :count].mean()
        expected = 1 / (1 + torch.exp(-(means[0] - 2 * means[1] + 0.1)))
        torch.testing.assert_close(first[row], expected)
        expected = 1 / (1 + torch.exp(-(0.5 * means[0] + 3 * means[1] - 0.2)))
        torch.testing.assert_close(second[row], expected)


def test_either_threshold_keeps_a_token() -> None:
    seen = torch.tensor([[0.2, 0.5, 0.9, torch.nan, 0.5]]).repeat(2, 1)
    place = torch.tensor([0.0, 0.0, 0.0, 0.8, 0.2])
    valid = torch.tensor([[True] * 5, [True, True, False, True, True]])
    assert picks_of(atp_llava(seen, place, 0.5, 0.3, valid=valid)) == [[2, 3], [3]]
    per_row = torch.tensor([0.1, 0.6])
    assert picks_of(atp_llava(seen, place, per_row, 1.0)) == [[0, 1, 2, 4], [2]]
    assert atp_llava(seen, place, 0.05, 0.0, k=2, order="score").tolist() == [[2, 3]] * 2
    assert atp_llava(seen, place, 1.0, 1.0, k=3).tolist() == [[-1] * 3] * 2
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        atp_llava(seen, place, 0.5, 0.3, k=-1)
    with pytest.raises(ValueError, match="order must be"):
        atp_llava(seen, place, 0.5, 0.3, order="best")
