"""ToMe for semantic binding: the tokens of an object and its attributes become one in a prompt.

Token Merging for Training-Free Semantic Binding in Text-to-Image Synthesis (arXiv 2411.07132).

The merged embeddings, which bind attributes to their objects; the paper then swaps the end token
and refines the embedding by gradients of a loss, which are not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._method import Family, Method, Needs


def bind(
    embeddings: Tensor,
    groups: Sequence[tuple[Sequence[int], Sequence[int]]],
    noun_weight: float = 1.1,
    attribute_weight: float = 1.2,
) -> Tensor:
    """Sums the tokens of every object into the first of its noun, and empties the others.

    Args:
        embeddings: [B, L, C] of the prompt, the same groups in every row.
        groups: (positions of the noun's tokens, positions of its attributes' tokens) an object.
        noun_weight, attribute_weight: of the sums over the two.

    Returns:
        [B, L, C], a new tensor, differentiable.

    Raises:
        ValueError: a noun without tokens, a position that is out of range or in two places.
    """
    length = embeddings.shape[1]
    weights = torch.eye(length, dtype=embeddings.dtype, device=embeddings.device)
    seen: set[int] = set()
    for nouns, attributes in groups:
        if not nouns:
            raise ValueError("groups must have a token for the noun of every object")
        for position in (*nouns, *attributes):
            if not 0 <= position < length or position in seen:
                raise ValueError(
                    f"groups must list positions from 0 to {length - 1}, each once, got {position}"
                )
            seen.add(position)
            weights[position] = 0
        weights[nouns[0], list(nouns)] = noun_weight
        weights[nouns[0], list(attributes)] = attribute_weight
    return weights @ embeddings


METHOD = Method(
    title="Token Merging for Training-Free Semantic Binding in Text-to-Image Synthesis",
    arxiv="2411.07132",
    family=Family.MERGE,
    needs=(Needs.IMAGE_DIFFUSION,),
    status="exact",
    summary="sum the embeddings of an object and its attributes into one token of a prompt",
)
