"""EmbedLens against the matrix of cosines to a vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cases.groups import tokens_of
from cases.selection import check_rows, padding
from tokred.methods.embed_lens import alive, nearest_words, select_tokens

VOCABULARY = tokens_of(1, 50)[0]
USELESS = (3, 17, 31, 44)


def transcription(x: torch.Tensor, valid: list[int], number: int) -> list[int]:
    words = VOCABULARY.to(x.dtype).double()
    cosine = functional.normalize(x.double(), dim=-1) @ functional.normalize(words, dim=-1).T
    nearest = cosine.argsort(dim=1, descending=True, stable=True)[:, :number]
    return [i for i in valid if not {*USELESS} & {*nearest[i].tolist()}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 3])
def test_picks(dtype: torch.dtype, number: int) -> None:
    def select(x: torch.Tensor, **options: object) -> torch.Tensor:
        return select_tokens(x, VOCABULARY, useless=USELESS, **options)

    x = tokens_of(3, 40).to(dtype)
    check_rows(select, transcription, [x], padding(3, 40), number=number)
    assert (select_tokens(x, VOCABULARY, useless=range(50)) == -1).all()


def test_a_small_vocabulary() -> None:
    words = nearest_words(tokens_of(2, 4), VOCABULARY[:2])
    assert words.shape == (2, 4, 3) and (words[..., 2] == -1).all()
    assert alive(words, ()).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"vocabulary must be \[V, 16\]"):
        nearest_words(tokens_of(1, 4), torch.ones(5, 3))
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        nearest_words(tokens_of(1, 4), VOCABULARY, 0)
    with pytest.raises(ValueError, match="order must be"):
        select_tokens(tokens_of(1, 4), VOCABULARY, order="best")
