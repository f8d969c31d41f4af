"""Croc: replace most patches of an image by learned tokens, each by the one that fits it best.

Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension (arXiv 2410.14332).

The published assignment is exact, by the Hungarian algorithm, no two patches having the same token.
The authors' code takes the nearest token of every patch, whichever others took it:
reference_compat=True. A step of training.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tokred

from ._method import Family, Method, Needs


def choose_patches(
    batch: int, patches: int, share: float = 0.75, generator: torch.Generator | None = None
) -> Tensor:
    """i64 [batch, int(share * patches)]: patches drawn at random for each image, ascending.

    On the CPU, by the generator (torch's own where None).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    return order[:, : int(share * patches)].sort(1).values


def nearest_tokens(patches: Tensor, tokens: Tensor, reference_compat: bool = False) -> Tensor:
    """The token for each patch, by Euclidean distance.

    Args:
        patches: [B, P, C]. tokens: [M, C], learned, M at least P unless reference_compat.
        reference_compat: see above.

    Returns:
        i32 [B, P]: of all ways to give every patch a token of its own, the one whose distances have
        the smallest sum.

    Raises:
        ValueError: more patches than tokens.
    """
    batch, count, _ = patches.shape
    if reference_compat:
        table = tokens.detach().expand(batch, -1, -1).contiguous()
        return tokred.match(patches.detach().contiguous(), table, metric="l2")[1]
    if count > tokens.shape[0]:
        raise ValueError(
            f"tokens must be at least as many as the {count} patches that each get one of their "
            f"own, got {tokens.shape[0]}"
        )
    distance = torch.cdist(patches.detach().float(), tokens.detach().float().expand(batch, -1, -1))
    return tokred.linear_assignment(distance).index


def replace_patches(
    x: Tensor, tokens: Tensor, chosen: Tensor, reference_compat: bool = False
) -> tuple[Tensor, Tensor]:
    """Puts tokens in the places of the chosen patches.

    Args:
        x: [B, N, C], all patches. tokens: [M, C], learned. chosen: i64 [B, P], choose_patches.

    Returns:
        (x [B, N, C] with the tokens in place, i32 [B, P] the number of each). Differentiable in x
        and tokens, the assignment being a choice.
    """
    places = chosen[..., None].expand(-1, -1, x.shape[2])
    index = nearest_tokens(x.gather(1, places), tokens, reference_compat)
    return x.scatter(1, places, tokens[index.long()].to(x.dtype)), index


METHOD = Method(
    title="Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension",
    arxiv="2410.14332",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="replace patches by learned tokens, assigned exactly, each once",
)
