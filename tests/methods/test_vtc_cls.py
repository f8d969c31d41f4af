"""VTC-CLS against sums over layers in plain torch."""

from __future__ import annotations

import pytest
import torch

from cases.selection import best_of, check_rows, padding, uniform, visual_call
from tokred.methods.vtc_cls import VtcClsOptions, ensemble, select_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picks(dtype: torch.dtype) -> None:
    layers = [uniform(3, 4, 30, seed=i).to(dtype) for i in range(5)]
    scores = ensemble(layers)
    expected = sum(layer.double().mean(1) for layer in layers)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)

    def transcription(scores: torch.Tensor, valid: list[int], k: int) -> list[int]:
        return sorted(best_of(scores, k, valid))

    for k in (0, 6, 40):
        check_rows(select_tokens, transcription, [scores], padding(3, 30), k=k)
    assert select_tokens(torch.ones(2, 9), 2, order="score").tolist() == [[0, 1]] * 2


def test_layers() -> None:
    assert VtcClsOptions().encoder_layers(24) == [*range(12, 23)]
    assert VtcClsOptions(first_layer=-3).encoder_layers(24) == [21, 22]
    for first in (23, -1, 30, -30):
        with pytest.raises(ValueError, match="first_layer must be before the last of 24 layers"):
            VtcClsOptions(first_layer=first).encoder_layers(24)
    with pytest.raises(ValueError, match="at least one layer, got none"):
        ensemble([])


def test_from_an_encoder() -> None:
    call = visual_call(layers=5)
    kept = VtcClsOptions(keep=7, first_layer=1).reduce_visual(call)
    scores = sum(call.class_attention(layer).mean(1) for layer in (1, 2, 3))
    assert torch.equal(kept, select_tokens(scores, 7))
