"""PPE: clusters of tokens keep several of their members' positions, for different frequencies.

PPE: Positional Preservation Embedding for Token Compression in Multimodal Large Language Models
(arXiv 2510.22936).

Density-peak clusters become means, each with the positions of its last k members; sections of the
rotary embedding read different ones. The authors' code adds noise to break ties of density, and
1e-6 to the sizes it divides by; here ties go to the lower index and nothing is added. Where a
cluster has fewer members than k they are repeated in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import tokred

from ._lists import check_count, check_minimum
from ._method import Family, Method, Needs


@dataclass(frozen=True)
class Compressed:
    """The clusters of rows of tokens.

    tokens: [B, M, C], the densest cluster first. token_map: i32 [B, N]. positions: of the dtype of
    those given, [B, 3 k, M]: k rows of times, then of heights, then of widths.
    """

    tokens: Tensor
    token_map: Tensor
    positions: Tensor


def compress(x: Tensor, positions: Tensor, ratio: float, k: int = 8) -> Compressed:
    """Clusters every row, such as the tokens of one frame, to ceil(N * ratio) tokens.

    Args:
        x: [B, N, C]. positions: [B, 3, N], or [B, 3 j, N] of an earlier compression, of which each
            cluster then keeps those of its members' first.
        ratio: in (0, 1]. k: positions that a cluster keeps of each of the three kinds.

    Differentiable in x. O(B N^2 C) time.

    Raises:
        ValueError: a ratio or k out of range, or positions that do not fit x.
    """
    check_minimum(1, k=k)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    batch, tokens, _ = x.shape
    kinds = positions.shape[1] if positions.dim() == 3 else 0
    if list(positions.shape) != [batch, kinds, tokens] or kinds < 3 or kinds % 3:
        raise ValueError(
            f"positions must be [{batch}, 3 or a multiple, {tokens}], got {list(positions.shape)}"
        )
    clusters = math.ceil(tokens * ratio)
    neighbours = 5 if clusters >= 5 else min(3, max(clusters // 2, 1))
    rows = x.detach().contiguous()
    rows = rows.float() if rows.dtype == torch.float64 else rows
    _, assignment = tokred.dpc_knn(rows, clusters, neighbours)
    merged, _ = tokred.merge(x.contiguous(), assignment, clusters, mode="plain_mean")
    members = last_members(assignment, clusters, k).flatten(1).long()
    kept = positions[:, :: kinds // 3].gather(2, members[:, None].expand(-1, 3, -1))
    kept = kept.unflatten(2, (clusters, k)).transpose(2, 3).flatten(1, 2)
    return Compressed(merged, assignment, kept)


def last_members(assignment: Tensor, clusters: int, k: int) -> Tensor:
    """i32 [B, clusters, k]: the last k members of every cluster, ascending, repeated where fewer.

    Args:
        assignment: i32 [B, N], -1 for tokens of no cluster. A cluster without members, as duplicate
            tokens leave them, gets some token.
    """
    check_count("k", k)
    order = assignment.argsort(dim=1, stable=True)
    number = torch.arange(clusters, device=assignment.device)
    counts = (assignment[:, None] == number[:, None]).sum(2)
    ends = counts.cumsum(1) + (assignment < 0).sum(1, keepdim=True)  # these come first
    place = torch.arange(k, device=assignment.device) - k + counts[..., None]
    inside = torch.where(place >= 0, place, place.remainder(counts[..., None].clamp(min=1)))
    # Of duplicate tokens a cluster may be empty.
    rows = ((ends - counts)[..., None] + inside).clamp(max=assignment.shape[1] - 1)
    return order.gather(1, rows.flatten(1)).view_as(rows).to(torch.int32)


def rotary_angles(positions: Tensor, inverse_frequency: Tensor, sections: Sequence[int]) -> Tensor:
    """The angles of a rotary embedding whose sections read different rows of positions.

    Args:
        positions: [B, 3 k, M]. inverse_frequency: f32 [D / 2].
        sections: how many frequencies each of consecutive sections has, D / 2 in all; section i
            reads row i mod 3 k.

    Returns:
        f32 [B, M, D / 2].

    Raises:
        ValueError: sections that do not add up.
    """
    if sum(sections) != inverse_frequency.shape[0]:
        raise ValueError(
            f"sections must add up to {inverse_frequency.shape[0]} frequencies, got "
            f"{list(sections)}"
        )
    kinds = positions.shape[1]
    row = [number % kinds for number, length in enumerate(sections) for _ in range(length)]
    return positions[:, row].transpose(1, 2).float() * inverse_frequency


METHOD = Method(
    title=(
        "PPE: Positional Preservation Embedding for Token Compression in Multimodal Large "
        "Language Models"
    ),
    arxiv="2510.22936",
    family=Family.MERGE,
    needs=(Needs.LANGUAGE_MODEL, Needs.TRAINING),
    status="exact",
    summary="cluster tokens, each cluster keeping the positions of several members",
)
