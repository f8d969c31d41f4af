"""EmbedLens against the matrix of cosines to a vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import tokred
from cases.groups import tokens_of
from cases.selection import check_rows, padding, picked, visual_call
from cases.tiny_vlms import FAMILIES
from tokred.methods.embed_lens import EmbedLensOptions, alive, nearest_words, select_tokens

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


def test_an_image() -> None:
    call = replace(visual_call(), vocabulary=VOCABULARY)
    method = EmbedLensOptions(useless=USELESS, number=2)
    for row, found in enumerate(method.reduce_visual(call)):
        assert picked(found) == transcription(call.tokens[row], list(range(24)), 2)
    with pytest.raises(ValueError, match="embed_lens reads the language model's embeddings"):
        method.reduce_visual(visual_call())
    for useless in ([3], (3.0,), (True,)):
        with pytest.raises(ValueError, match="useless must be a tuple of ints"):
            EmbedLensOptions(useless=useless)


def test_in_a_model() -> None:
    """Words of LLaVA's vocabulary drop the tokens that are nearest to them."""
    family = next(family for family in FAMILIES if family.name == "llava")
    model, inputs = family.model(), family.prompt((1, 2))
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        words = nearest_words(
            features.float().flatten(0, -2)[None], model.get_input_embeddings().weight, 1
        )
        useless = int(words.flatten().mode().values)
        with tokred.patch(model, "embed_lens", useless=(useless,), number=1) as handle:
            model(**inputs)
    left = sum(kept for _, kept in handle.counts)
    assert left == (words != useless).sum() and 0 < left < words.numel()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"vocabulary must be \[V, 16\]"):
        nearest_words(tokens_of(1, 4), torch.ones(5, 3))
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        nearest_words(tokens_of(1, 4), VOCABULARY, 0)
    with pytest.raises(ValueError, match="order must be"):
        select_tokens(tokens_of(1, 4), VOCABULARY, order="best")
