"""SCOPE against gains summed over the matrix of cosines, and in an image's tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding, uniform, visual_call
from tokred.methods.scope import ScopeOptions, select_tokens


def transcription(
    x: torch.Tensor, attention: torch.Tensor, valid: list[int], k: int, alpha: float = 1.0
) -> list[int]:
    unit = functional.normalize(x[valid].double(), dim=-1)
    cosine = unit @ unit.T
    weight = attention.double().mean(0)[valid] ** alpha
    covered, chosen = torch.zeros(len(valid), dtype=torch.float64), []
    for _ in range(min(k, len(valid))):
        gain = (cosine - covered[:, None]).clamp(min=0).sum(0) * weight
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        covered = torch.maximum(covered, cosine[chosen[-1]])
    return sorted(valid[i] for i in chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "alpha"), [(0, 1.0), (1, 1.0), (9, 0.5), (9, 0.0), (12, 2.0)])
def test_picks(dtype: torch.dtype, k: int, alpha: float) -> None:
    x, attention = tokens_of(3, 40).to(dtype), uniform(3, 4, 40).to(dtype)
    check_rows(select_tokens, transcription, [x, attention], padding(3, 40), k=k, alpha=alpha)


def test_more_than_there_are() -> None:
    found = select_tokens(tokens_of(2, 9), uniform(2, 9), 12)
    assert (found.sort(1).values == torch.tensor([-1] * 3 + [*range(9)])).all()


def test_in_an_image() -> None:
    call = visual_call()
    kept = ScopeOptions(keep=6, alpha=0.5).reduce_visual(call)
    attention = call.class_attention(-2)
    assert torch.equal(kept, select_tokens(call.tokens, attention, 6, alpha=0.5))
    assert ScopeOptions().encoder_layers(24) == [-2]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="x must be"):
        select_tokens(torch.ones(4, 3), torch.ones(1, 4), 2)
    with pytest.raises(ValueError, match="attention must be"):
        select_tokens(torch.ones(1, 4, 3), torch.ones(4), 2)
