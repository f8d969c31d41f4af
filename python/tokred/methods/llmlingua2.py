"""LLMLingua-2: keep the words whose probability of being kept is above a percentile.

LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression (arXiv
2403.12968).

The classifier is learned: its probabilities are an argument. So are the words, which are the
tokenizer's, and the tokens that are forced to stay, such as digits and line ends.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs
from ._picks import positions_of


def word_probabilities(
    probability: Tensor,
    starts: Tensor,
    valid: Tensor | None = None,
    force: Tensor | None = None,
    reduce: Literal["mean", "first"] = "mean",
) -> tuple[Tensor, Tensor]:
    """What every word has of its tokens.

    Args:
        probability: f32 [B, N], the classifier's, of every token to be kept.
        starts: bool [B, N], where a word begins; the first valid token does in any case.
        valid: bool [B, N], False is padding. force: bool [B, N], words with such a token get 1.
        reduce: the mean of the word's tokens, or its first.

    Returns:
        (f32 [B, N], the probability of word w, 0 behind the last; i32 [B, N], the word of every
        token, -1 for padding).
    """
    if reduce not in ("mean", "first"):
        raise ValueError(f'reduce must be "mean" or "first", got {reduce!r}')
    tokens = probability.shape[1]
    valid = torch.ones_like(starts) if valid is None else valid
    begins = (starts | (valid.cumsum(1) == 1)) & valid
    word = torch.where(valid, begins.cumsum(1) - 1, -1).to(torch.int32)
    p = probability.float()
    ids = torch.where(begins, word, -1) if reduce == "first" else word
    words = tokred.segment_pool(p[..., None].contiguous(), ids=ids, num_segments=tokens)[..., 0]
    if force is not None:
        forced = (force & valid).float()[..., None].contiguous()
        forced = tokred.segment_pool(forced, ids=word, num_segments=tokens, mode="amax")[..., 0]
        words = torch.where(forced > 0, 1.0, words)
    return words, word


def weighted_percentile(values: Tensor, count: Tensor, q: float) -> Tensor:
    """f64 [B, 1]: the q-th percentile, linear, of each row in which value w stands count[w] times.

    Args:
        values: [B, W]. count: integers [B, W], 0 leaves a value out. q: in [0, 100].

    Rows of nothing give NaN.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q must be in [0, 100], got {q}")
    values = values.double()
    ascending, order = torch.where(count > 0, values, torch.inf).sort(dim=1, stable=True)
    ends = count.long().gather(1, order).cumsum(1)
    total = ends[:, -1:]
    place = (total - 1).clamp(min=0).double() * (q / 100)
    low = place.floor().long()
    high = torch.minimum(low + 1, (total - 1).clamp(min=0))
    last = values.shape[1] - 1
    below, above = (
        ascending.gather(1, torch.searchsorted(ends, at, right=True).clamp(max=last))
        for at in (low, high)
    )
    part, step = place - low, above - below
    # numpy's order of operations, so that a value equal to the percentile is equal here too.
    found = torch.where(part < 0.5, below + step * part, above - step * (1 - part))
    return torch.where(total > 0, torch.where(step == 0, below, found), torch.nan)


def keep_words(words: Tensor, count: Tensor, rate: float) -> Tensor:
    """The words above the percentile int(100 (1 - rate) + 1), at most 100.

    Args:
        words: f32 [B, W], word_probabilities.
        count: integers [B, W], how many tokens of the language model each word has, 0 for none.
        rate: the share of these tokens to keep, in [0, 1].

    Returns:
        bool [B, W]: p > percentile, or both are 1.

    Raises:
        ValueError: a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    threshold = weighted_percentile(words, count, min(int(100 * (1 - rate) + 1), 100))
    p = words.double()
    return ((p > threshold) | ((p == 1) & (threshold == 1))) & (count > 0)


def keep_tokens(keep: Tensor, word: Tensor) -> Tensor:
    """i32 [B, N]: the tokens of the words that stay, ascending, -1 behind the last.

    Args:
        keep: bool [B, W]. word: i32 [B, N], the word of every token, -1 for none.
    """
    stays = keep.gather(1, word.clamp(min=0).long()) & (word >= 0)
    return positions_of(stays)


def keep_chunks(probability: Tensor, chunk: Tensor, num_chunks: int, rate: float) -> Tensor:
    """The chunks of a long context that stay before their words are chosen.

    Args:
        probability: f32 [B, N]. chunk: i32 [B, N], the chunk of every token, -1 for none.
        rate: of the whole compression; chunks are kept at (rate + 1) / 2.

    Returns:
        bool [B, num_chunks]: those whose mean is at least the percentile int(100 (1 - that)).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    ids = chunk.to(torch.int32).contiguous()
    values = torch.stack([probability.float(), torch.ones_like(probability.float())], -1)
    sums = tokred.segment_pool(values, ids=ids, num_segments=num_chunks, mode="sum")
    means, there = sums[..., 0] / sums[..., 1].clamp(min=1), sums[..., 1] > 0
    threshold = weighted_percentile(means, there.long(), int(100 * (1 - (rate + 1) / 2)))
    return (means.double() >= threshold) & there


METHOD = Method(
    title=(
        "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression"
    ),
    arxiv="2403.12968",
    family=Family.PRUNE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="keep the words above a percentile of the classifier's probabilities",
)
