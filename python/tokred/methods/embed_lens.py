"""EmbedLens: drop the visual tokens that are nearest to words which only sinks and dead ones are.

What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language
Models (arXiv 2603.00510).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, check_order, features_of
from ._lists import check_minimum
from ._method import Family, Method, Needs, Options
from ._picks import in_order, positions_of

if TYPE_CHECKING:
    from tokred.patching import VisualCall

VIT_SINK, LLM_SINK, DEAD = 1141, 26673, 30296  # of the vocabulary of LLaVA-1.5
FIRST_WORDS, MORE_WORDS = 512, 4  # compared with all tokens; with those left, so many times as many


def _check_words(x: Tensor, vocabulary: Tensor, number: int) -> None:
    check_features("x", x)
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    if vocabulary.dim() != 2 or vocabulary.shape[1] != x.shape[2]:
        raise ValueError(f"vocabulary must be [V, {x.shape[2]}], got {list(vocabulary.shape)}")


def nearest_words(x: Tensor, vocabulary: Tensor, number: int = 3) -> Tensor:
    """i32 [B, N, number]: the words whose embeddings have the largest cosine to a token.

    Best first, the lower word on a tie, -1 behind the last.

    Args:
        x: [B, N, C], the visual tokens as the language model reads them.
        vocabulary: [V, C], its input embeddings.

    O(B N V C) time; of the N x V cosines only the best are in memory.
    """
    _check_words(x, vocabulary, number)
    rows = features_of(x).flatten(0, 1)[None]
    _, words = tokred.match(rows, features_of(vocabulary).to(rows.dtype)[None], k=number)
    return words.reshape(*x.shape[:2], number)


def alive(words: Tensor, useless: Sequence[int] = (VIT_SINK, LLM_SINK, DEAD)) -> Tensor:
    """bool [B, N]: the tokens none of whose nearest words i32 [B, N, n] is a useless one."""
    targets = torch.tensor(useless, dtype=words.dtype, device=words.device)
    return ~torch.isin(words, targets).any(-1)


def select_tokens(
    x: Tensor,
    vocabulary: Tensor,
    valid: Tensor | None = None,
    order: str = "position",
    useless: Sequence[int] = (VIT_SINK, LLM_SINK, DEAD),
    number: int = 3,
) -> Tensor:
    """The tokens that are alive.

    Args:
        x: [B, N, C], the visual tokens as the language model reads them.
        vocabulary: [V, C], its input embeddings.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published; there are no scores.
        useless: words that mark a token of the encoder's sinks, of the language model's, or a dead
            one. number: how many of the nearest words must be none of them.

    Returns:
        i32 [B, N], -1 behind the last.

    Raises:
        ValueError: another shape or order.
    """
    check_order(order)
    if x.is_cuda or torch.compiler.is_compiling():
        keep = alive(nearest_words(x, vocabulary, number), useless)
    else:
        keep = _alive_early(x, vocabulary, useless, number)
    return in_order(positions_of(keep if valid is None else keep & valid), order)


def _alive_early(x: Tensor, vocabulary: Tensor, useless: Sequence[int], number: int) -> Tensor:
    """alive(nearest_words(x, vocabulary, number), useless), without most of the cosines.

    A token is alive as soon as `number` other words are nearer than its nearest useless one, so
    that most need only be compared with the first words.
    """
    _check_words(x, vocabulary, number)
    total = len(vocabulary)
    marks = sorted({word for word in useless if 0 <= word < total})
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if not marks or keep.numel() == 0:
        return keep
    rows = features_of(x).flatten(0, 1)
    words = features_of(vocabulary).to(rows.dtype)
    is_useless = torch.zeros(total, dtype=torch.bool)
    is_useless[marks] = True
    mark, place = tokred.match(rows[None], words[marks][None])
    compared = place[0] >= 0
    mark, place = mark[0], torch.tensor(marks)[place[0].clamp(min=0).long()]
    best = rows.new_full((len(rows), number), -torch.inf, dtype=torch.float32)
    index = torch.full_like(best, total, dtype=torch.int64)
    left, first, width = compared.nonzero()[:, 0], 0, FIRST_WORDS
    while len(left) and first < total:
        part = slice(first, first + width)
        score, found = tokred.match(
            rows[left][None], words[part][None], mask_b=~is_useless[part][None], k=number
        )
        score = torch.cat([best[left], score.view(-1, number)], 1)
        found = torch.where(found < 0, total, found.long() + first).view(-1, number)
        # Those of earlier words come first among equal ones.
        score, order = score.sort(dim=1, descending=True, stable=True)
        best[left] = score[:, :number]
        index[left] = torch.cat([index[left], found], 1).gather(1, order)[:, :number]
        last, at = best[left, -1], index[left, -1]
        nearer = (last > mark[left]) | ((last == mark[left]) & (at < place[left]))
        left, first, width = left[~nearer], first + width, width * MORE_WORDS
    keep.view(-1)[left] = False
    return keep


@dataclass(frozen=True)
class EmbedLensOptions(Options):
    """Options of tokred.patch(model, "embed_lens", ...).

    useless: words of the vocabulary that mark a token to drop; the default ones are those of
    LLaVA-1.5, and mean nothing in the vocabulary of another language model.
    number: how many of the nearest words must be none of them.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    How many tokens stay follows from the image.
    """

    useless: tuple[int, ...] = (VIT_SINK, LLM_SINK, DEAD)
    number: int = 3
    positions: Literal["auto", "kept", "renumbered"] = "auto"
    newlines: Literal["keep", "drop"] = "keep"

    adapters: ClassVar[tuple[str, ...]] = ("vision_language",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(1, number=self.number)
        whole = isinstance(self.useless, tuple) and all(type(word) is int for word in self.useless)
        if not whole:
            raise ValueError(f"useless must be a tuple of ints, got {self.useless!r}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """None: the tokens and the vocabulary are all that it reads."""
        return []

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image.

        Raises:
            ValueError: the vocabulary of the language model is not known.
        """
        if call.vocabulary is None:
            raise ValueError(f"embed_lens reads the language model's embeddings: {call.why_not}")
        return select_tokens(
            call.features, call.vocabulary, useless=self.useless, number=self.number
        )


METHOD = Method(
    title=(
        "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal "
        "Large Language Models"
    ),
    arxiv="2603.00510",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="drop visual tokens whose nearest words mark them as sinks or as dead",
    options=EmbedLensOptions,
)
