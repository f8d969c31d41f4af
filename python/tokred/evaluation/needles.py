"""Needles: sentences that give a city a number, hidden in a text, and asked for after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEEDLES = (("Lisbon", "48213"), ("Oslo", "90576"), ("Quito", "17364"), ("Hanoi", "62981"))


@dataclass(frozen=True)
class Needle:
    """One hidden number, in tokens i64 [B, N].

    sentence: what is hidden in the text. question: what the model reads after the text. answer: the
    number, which the model should predict next.
    """

    sentence: Tensor
    question: Tensor
    answer: Tensor

    def named(self, log_probabilities: Callable[[Tensor], Tensor]) -> Tensor:
        """bool [.., N]: the tokens of the answer that are the most probable after the question.

        Args:
            log_probabilities: gives f32 [.., N, vocabulary], of the token that follows each of
                ids i64 [B, N].
        """
        asked = torch.cat([self.question, self.answer], 1)[:, :-1]
        best = log_probabilities(asked).argmax(-1)
        return best[..., self.question.shape[1] - 1 :] == self.answer[0]

    def to(self, ids: Tensor) -> Needle:
        """The same for every row of a batch of ids [B, N], on their device."""
        rows = len(ids)
        sentence, question, answer = (
            part.to(ids.device).expand(rows, -1)
            for part in (self.sentence, self.question, self.answer)
        )
        return Needle(sentence, question, answer)


def needles(tokenizer: Any) -> list[Needle]:
    """All of NEEDLES in the tokens of a tokenizer of transformers."""
    return [
        Needle(
            ids_of(tokenizer, f" The code of {city} is {code}. "),
            ids_of(tokenizer, f"\n The code of {city} is"),
            ids_of(tokenizer, f" {code}"),
        )
        for city, code in NEEDLES
    ]


def ids_of(tokenizer: Any, text: str) -> Tensor:
    """i64 [1, N], without the tokens that begin and end a text."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def hidden(words: Tensor, inserted: Sequence[Needle]) -> Tensor:
    """i64 [B, N]: the words, i64 [B, M], with the sentences of the needles at even distances."""
    count = len(inserted)
    ends = [words.shape[1] * (i + 1) // (count + 1) for i in range(count)]
    parts: list[Tensor] = []
    for first, last, needle in zip([0, *ends], ends, inserted, strict=False):
        parts += [words[:, first:last], needle.to(words).sentence]
    return torch.cat([*parts, words[:, ends[-1] :]], 1)


@dataclass(frozen=True)
class Prompt:
    """What a model reads, i64 [1, N] each.

    context: the text that fills the cache, with the needles. after: what follows it in the text.
    """

    context: Tensor
    after: Tensor
    needles: list[Needle]

    @classmethod
    def of(cls, tokenizer: Any, text: str, context: int, decoded: int) -> Prompt:
        """So many tokens of the text, needles included, and what follows.

        Raises:
            ValueError: the text has too few tokens.
        """
        inserted, words = needles(tokenizer), ids_of(tokenizer, text)
        room = context - sum(needle.sentence.shape[1] for needle in inserted)
        if room < 1 or words.shape[1] < room + decoded + 1:
            raise ValueError(
                f"the text must have at least {max(room, 1) + decoded + 1} tokens for a context of "
                f"{context} with {len(inserted)} needles, got {words.shape[1]}"
            )
        after = words[:, room : room + decoded + 1]
        return cls(hidden(words[:, :room], inserted), after, inserted)
