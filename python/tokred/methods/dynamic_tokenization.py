"""Dynamic tokenisation: byte-pair encoding of a batch, so that frequent pairs become one token.

Retrofitting Large Language Models with Dynamic Tokenization (arXiv 2411.18553).

Pairs are counted and joined in NumPy, on the CPU, where token ids come from. Embeddings of the new
tokens are the means of their parts' (FVT); the paper has a learned network predict better ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import tokred

from ._lists import check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class DynamicTokens:
    """A batch after its merges.

    ids: i64 [B, N], -1 behind a row's last; the pair of merge i is num_ids + i. lengths: i32 [B].
    token_map: i32 [B, N], the new token that each old one went to, -1 for padding. merges: the
    pairs in their order, in ids of the time.
    """

    ids: Tensor
    lengths: Tensor
    token_map: Tensor
    merges: tuple[tuple[int, int], ...]


def batch_bpe(
    ids: Tensor, merges: int, num_ids: int, word_ids: Tensor | None = None
) -> DynamicTokens:
    """Joins the most frequent pair of neighbours in the batch, `merges` times.

    Of pairs that are equally frequent the one that comes first in the batch is joined; where a
    token could go with either neighbour it goes with the next one, from left to right.

    Args:
        ids: integers [B, N] below num_ids, negative at the end of a row for padding.
        merges: at most; it ends before where no pair is left.
        num_ids: the size of the vocabulary.
        word_ids: integers [B, N]; only tokens with the same one, that is not negative, are joined.
            Whole rows where None.

    Complexity: O(merges * T log T) for T tokens in the batch.

    Raises:
        ValueError: ids of another shape or range, or padding before a row's end.
    """
    check_minimum(0, merges=merges)
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"ids must be integers [B, N], got {list(ids.shape)} in {ids.dtype}")
    if word_ids is not None and word_ids.shape != ids.shape:
        raise ValueError(f"word_ids must be {list(ids.shape)}, got {list(word_ids.shape)}")
    table = ids.cpu().numpy().astype(np.int64)
    inside = table >= 0
    if (inside[:, 1:] & ~inside[:, :-1]).any() or (table >= num_ids).any():
        raise ValueError(f"ids must be below {num_ids}, and negative only at the end of a row")
    batch = len(table)
    # All rows in one line; a pair may join only within its group, a row or a word of it.
    tokens = table[inside]
    rows = np.broadcast_to(np.arange(batch)[:, None], table.shape)[inside]
    words = rows if word_ids is None else word_ids.cpu().numpy()[inside]
    joins = (rows[1:] == rows[:-1]) & (words[1:] == words[:-1]) & (words[1:] >= 0)
    heads = np.arange(len(tokens))
    done: list[tuple[int, int]] = []
    for new in range(num_ids, num_ids + merges):
        places = np.flatnonzero(joins)
        if len(places) == 0:
            break
        pairs = tokens[places] * np.int64(num_ids + merges) + tokens[places + 1]
        _, first, counts = np.unique(pairs, return_index=True, return_counts=True)
        best = pairs[first[np.lexsort((first, -counts))[0]]]
        left = _from_the_left(places[pairs == best])
        done.append((int(tokens[left[0]]), int(tokens[left[0] + 1])))
        tokens[left] = new
        keep = np.ones(len(tokens), bool)
        keep[left + 1] = False
        tokens, heads = tokens[keep], heads[keep]
        # A pair joins with what comes next if its second token did.
        joins = np.r_[joins, False]
        joins[left] = joins[left + 1]
        joins = joins[keep][:-1]
    return _in_rows(tokens, heads, rows, inside, tuple(done), ids.device)


def _from_the_left(places: np.ndarray) -> np.ndarray:
    """From ascending places [n] and from the left, those whose left neighbour is not taken."""
    starts = np.r_[True, np.diff(places) > 1]
    run = np.maximum.accumulate(np.where(starts, np.arange(len(places)), 0))
    return places[(np.arange(len(places)) - run) % 2 == 0]


def _in_rows(
    tokens: np.ndarray,
    heads: np.ndarray,
    rows: np.ndarray,
    inside: np.ndarray,
    merges: tuple[tuple[int, int], ...],
    device: torch.device,
) -> DynamicTokens:
    """The line of tokens, and where in it each came from, as rows again."""
    batch, width = inside.shape
    lengths = np.bincount(rows[heads], minlength=batch) if len(heads) else np.zeros(batch, int)
    first = np.r_[0, np.cumsum(lengths)[:-1]] if batch else lengths
    is_head = np.zeros(len(rows), bool)
    is_head[heads] = True
    slots = np.cumsum(is_head) - 1 - first[rows] if len(rows) else np.zeros(0, int)
    new, token_map = np.full((batch, width), -1), np.full((batch, width), -1, np.int32)
    new[np.arange(width) < lengths[:, None]] = tokens
    token_map[inside] = slots
    return DynamicTokens(
        torch.from_numpy(new).to(device),
        torch.from_numpy(lengths.astype(np.int32)).to(device),
        torch.from_numpy(token_map).to(device),
        merges,
    )


def mean_embeddings(embeddings: Tensor, dynamic: DynamicTokens) -> Tensor:
    """The mean of the embeddings of every token's parts.

    Args:
        embeddings: [B, N, C] of the tokens before.

    Returns:
        [B, N, C], zeros behind a row's last token; differentiable.
    """
    tokens = embeddings.shape[1]
    return tokred.merge(embeddings, dynamic.token_map, tokens, mode="plain_mean")[0]


METHOD = Method(
    title="Retrofitting Large Language Models with Dynamic Tokenization",
    arxiv="2411.18553",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="join the most frequent pairs of tokens of a batch, as byte-pair encoding does",
)
