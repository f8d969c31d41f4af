"""VFlowOpt: rank visual tokens by attention and entropy, merge the lowest ones of each cell.

VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization (arXiv
2508.05211).

The shares that each stage keeps are what the paper optimises, and arguments here; its later stages
inside the language model keep the best tokens by the same importance. The published code takes the
entropy of normalised pixels, whose negative values wrap around in 8 bits; here it is that of the
image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._maps import identity, map_of_links
from ._method import Family, Method, Needs
from ._selection import best, check_features, check_grid, mask_of, positions_of


def patch_entropy(pixels: Tensor, patch: int = 14) -> Tensor:
    """f32 [B, N]: the entropy of every patch's grey values, in bits, patches row by row.

    Args:
        pixels: [B, 3, H, W], from 0 to 1; patch divides both sizes.

    Raises:
        ValueError: another shape.
    """
    sizes = pixels.shape
    if pixels.dim() != 4 or sizes[1] != 3 or patch < 1 or sizes[2] % patch or sizes[3] % patch:
        raise ValueError(
            f"pixels must be [B, 3, H, W] with H and W multiples of {patch}, got {list(sizes)}"
        )
    levels = (pixels.detach().float().clamp(0, 1) * 255).floor()
    grey = (levels.sum(1) * 0.3333).round().long().clamp(0, 255)
    rows = functional.unfold(grey.float()[:, None], patch, stride=patch).mT.long()
    counts = torch.zeros(*rows.shape[:2], 256, device=pixels.device)
    share = counts.scatter_add_(2, rows, torch.ones_like(rows, dtype=torch.float32)) / patch**2
    return -(share * (share + 1e-10).log2()).sum(2)


def importance(
    q: Tensor,
    k: Tensor,
    entropy: Tensor | None = None,
    threshold: float = 1.0,
    alpha: float = 1.0,
    scale: float | None = None,
) -> Tensor:
    """f32 [B, N]: the attention received from strong queries, plus alpha softmax(entropy).

    Strong queries are those that receive more than threshold times the mean themselves; means over
    heads and queries.

    Args:
        q, k: [B, H, N, D], of a late layer of the encoder. entropy: f32 [B, N], patch_entropy.
        scale: of the logits, 1 / sqrt(D) where None.

    O(B H N^2 D) time, memory linear in N.
    """
    q, k = q.detach(), k.detach()
    received = tokred.attention_columns(q, k, reduce="mean", scale=scale).mean(1)
    strong = received > threshold * received.mean(1, keepdim=True)
    weight = strong.float()[:, None].contiguous()
    columns = tokred.attention_columns(q, k, weight=weight, scale=scale).mean(1)
    scores = columns / strong.sum(1, keepdim=True).clamp(min=1)
    return scores if entropy is None else scores + alpha * entropy.float().softmax(1)


@dataclass(frozen=True)
class Recycled:
    """The tokens that are left.

    tokens: [B, K, C], zeros behind a row's last. positions: i32 [B, K] in the row of all, -1 behind
    it. lengths: i32 [B]. token_map: i32 [B, N], the slot that each token went to, -1 where it was
    dropped, which none is.
    """

    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    token_map: Tensor


def low_tokens(tokens: int, ratio: float, cell: int) -> int:
    """How many tokens merge: round(N (1 - ratio)), and int(N / cell^2) more, at most N."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")
    if cell < 1:
        raise ValueError(f"cell must be at least 1, got {cell}")
    return min(tokens, round(tokens * (1 - ratio)) + int(tokens / cell**2))


def recycle(
    x: Tensor, scores: Tensor, grid: tuple[int, int], ratio: float = 0.5, cell: int = 4
) -> Recycled:
    """Merges the low tokens of each cell of the grid into one, where the best of them stood.

    Means are weighted by the scores. All other tokens stay as they are; how many are left depends
    on how many cells have a low token.

    Args:
        x: [B, H * W, C], row by row. scores: f32 [B, N], importance, above 0. grid: (H, W).
        ratio, cell: see low_tokens.

    Returns:
        Recycled with K = N - low + min(low, cells) slots, in order of position. tokens is
        differentiable in x.

    Raises:
        ValueError: another shape or grid, or a ratio outside [0, 1].

    O(B N C) time.
    """
    check_features("x", x)
    batch, tokens, _ = x.shape
    check_grid(tokens, grid)
    low = low_tokens(tokens, ratio, cell)
    columns = -(-grid[1] // cell)
    cells = -(-grid[0] // cell) * columns
    place = torch.arange(tokens, device=x.device)
    of = place // grid[1] // cell * columns + place % grid[1] // cell
    scores = scores.detach().float()
    ranked = best(-scores, low, order="score")
    merging = mask_of(ranked, tokens)
    # Ranks from the best token on; that of a cell's leader is the least of its low tokens.
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, place.expand(batch, -1))
    least = torch.full((batch, cells), tokens, device=x.device)
    member = torch.where(merging, rank, tokens)
    least = least.scatter_reduce(1, of.expand(batch, -1), member, "amin")
    leader = order.gather(1, least.clamp(max=tokens - 1)).to(torch.int32)
    links = torch.where(merging, leader[:, of], identity(x))
    token_map, lengths = map_of_links(links)
    kept = tokens - low + min(low, cells)
    weight = torch.where(merging, scores.clamp(min=1e-30), 1.0)
    merged, _ = tokred.merge(x.contiguous(), token_map, kept, weight=weight.contiguous())
    return Recycled(merged, positions_of(links == identity(x), kept), lengths, token_map)


METHOD = Method(
    title=(
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided "
        "Optimization"
    ),
    arxiv="2508.05211",
    family=Family.MERGE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="rank visual tokens by attention and entropy, merge the lowest ones of each cell",
)
