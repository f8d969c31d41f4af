"""Learn Your Tokens: encode the characters of every word apart, and pool them to one token.

Learn Your Tokens: Word-Pooled Tokenization for Language Modeling (arXiv 2310.11628).

The two ends of the model: attention inside words, their vectors for the language model between,
and back. The models are trained with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._lists import check_minimum, range_list
from ._method import Family, Method, Needs
from .code_tokens import unit_map


def word_starts(word_ids: Tensor) -> Tensor:
    """i32 [B, N]: the position of the first token of every token's word.

    Args:
        word_ids: integers [B, N]; a word is a run of equal ids, and negative ids stand alone.
    """
    slots, _ = unit_map(word_ids)
    position = torch.arange(slots.shape[1], device=slots.device)
    new = torch.ones_like(slots, dtype=torch.bool)
    new[:, 1:] = slots[:, 1:] != slots[:, :-1]
    return torch.where(new, position, 0).cummax(1).values.to(torch.int32)


def word_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    word_ids: Tensor,
    longest: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of every token within its word.

    Args:
        q: [B, Hq, N, D]. k, v: [B, Hkv, N, D]. word_ids: as in word_starts.
        longest: no word has more tokens; of a longer one the last so many are attended to. None
            reads it from the device, and waits for it.

    Returns:
        [B, Hq, N, D]; differentiable. O(B Hq N longest D) time, no mask of N x N.
    """
    starts = word_starts(word_ids)
    end = torch.arange(1, starts.shape[1] + 1, dtype=torch.int32, device=starts.device)
    if longest is None:
        longest = int((end - starts).max()) if starts.numel() else 1
    check_minimum(1, longest=longest)
    first = torch.maximum(starts, end - longest)
    keys = range_list(first, end.expand_as(first), longest)[:, None]
    return tokred.sparse_attention(q, k, v, keys, scale=scale, block_q=1)[0]


def pool_words(
    h: Tensor, word_ids: Tensor, score: Tensor | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The vector of every word: its last token, which has seen the whole word, or a mean.

    Args:
        h: [B, N, C]. word_ids: as in word_starts; put the token that stands for a word last in it.
        score: f32 [B, N]; where given, the mean of the word by the softmax of its scores instead.
        capacity: words of a row, N where None; those beyond it are left out.

    Returns:
        (words [B, capacity, C], zeros behind a row's last; lengths i32 [B]; token_map i32 [B, N]),
        tokred.unmerge of which gives every token the vector of its word. Differentiable.
    """
    token_map, lengths = unit_map(word_ids)
    capacity = h.shape[1] if capacity is None else capacity
    mode = "last" if score is None else "softmax"
    words = tokred.segment_pool(h, ids=token_map, num_segments=capacity, mode=mode, weight=score)
    return words, lengths.clamp(max=capacity), token_map


METHOD = Method(
    title="Learn Your Tokens: Word-Pooled Tokenization for Language Modeling",
    arxiv="2310.11628",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="attend within words, pool each to one token, and back",
)
