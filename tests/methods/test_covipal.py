"""CoViPAL's choice, and what its module is taught, against the attention matrix."""

from __future__ import annotations

import pytest
import torch

from cases.prompts import attention_of, picks_of, prompt_call, ranked
from tokred.methods.covipal import attention_target, covipal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice(dtype: torch.dtype) -> None:
    scores = (
        torch.tensor([[0.5, 0.25, 1.0, torch.nan, 0.5, 0.0, 2.0, 0.125]]).repeat(2, 1).to(dtype)
    )
    valid = torch.tensor([[True] * 8, [True] * 6 + [False] * 2])
    assert picks_of(covipal(scores, 0.5, valid=valid)) == [[0, 2, 4, 6], [0, 2, 4]]
    assert covipal(scores, 0.5, valid=valid).shape == (2, 4)
    assert covipal(scores, keep=2).tolist() == [[2, 6]] * 2
    assert covipal(scores, 0.5, order="score")[0].tolist() == [6, 2, 0, 4]
    assert picks_of(covipal(scores, 1.0)) == [[0, 1, 2, 4, 5, 6, 7]] * 2
    for wrong, words in (({"ratio": 1.5}, "ratio must be"), ({"keep": -1}, "keep must be")):
        with pytest.raises(ValueError, match=words):
            covipal(scores, **wrong)


def test_target() -> None:
    call = prompt_call()
    (q, k), matrix = call.previous(), attention_of(call, "previous")
    got = attention_target(q, k, call.after_images, 5, call.visual, call.scale, call.valid)
    for row, slots in enumerate(call.slots.tolist()):
        slots = [s for s in slots if s >= 0]
        seen = matrix[row][:, -7:][:, :, slots].sum((0, 1)).float().tolist()
        expected = torch.zeros(got.shape[1])
        expected[[slots[i] for i in ranked(seen, 5)]] = 1
        assert torch.equal(got[row], expected)
