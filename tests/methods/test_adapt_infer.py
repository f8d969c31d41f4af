"""AdaptInfer's weights and scores against the attention matrix, and its published counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases.prompts import attention_of, cut, picks_of, prompt_call, ranked
from tokred.methods.adapt_infer import (
    AdaptInferOptions,
    adapt_infer,
    guided_scores,
    text_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(matrix: Tensor, text: Tensor) -> Tensor:
    """w[h, t] of one row: what t gives to and gets from the text, itself once; f64 [H, L]."""
    block = matrix * text[:, None] * text
    return block.sum(1) + block.sum(2) - block.diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blend", [1.0, 0.25])
def test_weights_and_scores(dtype: torch.dtype, blend: float) -> None:
    call = prompt_call(dtype=dtype)
    (q, k), matrix, text = call.previous(), attention_of(call, "previous"), call.after_images
    arguments = (q, k, text, call.scale, call.valid, blend)
    expected, scores = [], []
    for row in range(3):
        w = weights_of(matrix[row], text[row])
        mean = w.sum() / (4 * text[row].sum())
        w = torch.where(text[row], blend * w + (1 - blend) * mean, 0)
        expected.append(w)
        scores.append((w[:, :, None] * matrix[row]).sum((0, 1)))
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text_weights(*arguments), torch.stack(expected).float(), **close)
    torch.testing.assert_close(guided_scores(*arguments), torch.stack(scores).float(), **close)


def test_a_stage_keeps_the_best() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.5, torch.nan]])
    assert adapt_infer(scores, 2).tolist() == [[1, 2]]
    assert adapt_infer(scores, 4).tolist() == [[0, 1, 2, -1]]


def test_three_stages_in_a_prompt() -> None:
    method = AdaptInferOptions(keep=5)  # 133, 27 and 3 times 5 / 64
    assert method.prune_layers(32) == [2, 11, 21]
    call = prompt_call(num_layers=32)
    for layer, counts in ((2, (10, 10, 0)), (11, (2, 2, 0)), (21, (0, 0, 0))):
        call.layer = layer
        matrix, wanted = attention_of(call, "previous"), []
        for row, left in enumerate(counts):
            slots = [s for s in call.slots[row].tolist() if s >= 0]
            w = weights_of(matrix[row], call.after_images[row])
            scores = (w[:, :, None] * matrix[row]).sum((0, 1))[slots]
            wanted.append(ranked(scores.float().tolist(), left))
        chosen = method.prune(call)
        assert picks_of(chosen) == wanted
        call = cut(call, chosen)


def test_published_counts() -> None:
    def counts(tokens: int, **options: float) -> list[int]:
        method = AdaptInferOptions(**options)
        return [
            int(method.left(torch.tensor(float(tokens), dtype=torch.float64), stage, 3) + 1e-9)
            for stage in range(3)
        ]

    assert counts(576, keep=128) == [290, 72, 18] and counts(576) == [133, 27, 3]
    assert counts(576, keep=48) == [80, 24, 2] and counts(576, keep=32) == [40, 12, 0]
    assert counts(20, keep=64) == [20, 20, 3] and counts(576, keep=96) == [199, 40, 4]
    assert counts(2880, ratio=64 / 576) == [665, 135, 15] and counts(9, ratio=1.0) == [9, 9, 9]
    with pytest.raises(ValueError, match=r"blend must be in \[0, 1\], got 2"):
        AdaptInferOptions(blend=2)
    with pytest.raises(ValueError, match="stages must be three layers, got"):
        AdaptInferOptions(stages=(1, 2))
