"""Token merging for code: the parts of one identifier become their mean.

On the Effect of Token Merging on Pre-trained Models for Code (arXiv 2507.14423).

Which tokens belong together is the tokenizer's word_ids, or a parser's. The learned strategy gives
every token a weight; it comes as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def unit_map(word_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every run of equal ids becomes one slot.

    Args:
        word_ids: integers [B, N]; tokens that are negative stand alone, each in a slot of its own.

    Returns:
        (token_map i32 [B, N], lengths i32 [B], the slots of each row).
    """
    if word_ids.dim() != 2 or word_ids.is_floating_point():
        raise ValueError(
            f"word_ids must be integers [B, N], got {list(word_ids.shape)} in {word_ids.dtype}"
        )
    starts = torch.ones_like(word_ids, dtype=torch.bool)
    starts[:, 1:] = (word_ids[:, 1:] != word_ids[:, :-1]) | (word_ids[:, 1:] < 0)
    return (starts.cumsum(1) - 1).to(torch.int32), starts.sum(1, dtype=torch.int32)


def merge_units(
    h: Tensor, word_ids: Tensor, weight: Tensor | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean hidden state of every unit.

    Args:
        h: [B, N, C]. word_ids: as in unit_map.
        weight: f32 [B, N], above 0, of a learned strategy; all alike where None.
        capacity: slots of a row, N where None; units beyond it are dropped.

    Returns:
        (y [B, capacity, C], zeros after a row's length; lengths i32 [B]; token_map i32 [B, N]).
        Differentiable in h and weight; tokred.unmerge gives every token its unit.
    """
    token_map, lengths = unit_map(word_ids)
    capacity = h.shape[1] if capacity is None else capacity
    y, _ = tokred.merge(h, token_map, capacity, weight=weight, mode="plain_mean")
    return y, lengths.clamp(max=capacity), token_map


METHOD = Method(
    title="On the Effect of Token Merging on Pre-trained Models for Code",
    arxiv="2507.14423",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="the sub-tokens of an identifier become their mean",
)
