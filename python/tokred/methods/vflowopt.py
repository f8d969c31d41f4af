"""VFlowOpt: rank visual tokens by attention and entropy, merge the lowest ones of each cell.

VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization (arXiv
2508.05211).

The shares that each stage keeps are what the paper optimises, and arguments here; its later stages
inside the language model keep the best tokens by the same importance, and are not a part of the
patch. The published code takes the entropy of normalised pixels, whose negative values wrap around
in 8 bits; here it is that of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

import tokred

from ._arguments import check_features, head_mean
from ._crops import crops_of
from ._grids import check_grid
from ._lists import check_minimum
from ._maps import identity, map_of_links
from ._method import Family, Method, Needs
from ._picks import best, mask_of, positions_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall, VisualTokens


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

    O(B H N^2 D) time, the strong queries' share of it once more; memory linear in N.
    """
    q, k = q.detach(), k.detach()
    lse = tokred.biased_attention(q, k, k[..., :1], scale=scale)[1]
    received = tokred.attention_columns(q, k, lse, reduce="mean", scale=scale).mean(1)
    strong = received > threshold * received.mean(1, keepdim=True)
    number, weight = strong.sum(1, keepdim=True), strong.float()
    if not (q.is_cuda or torch.compiler.is_compiling()):
        # The others' columns weigh nothing: not to multiply them is worth finding out how many.
        picks = positions_of(strong, int(number.max()) if len(number) else 0)
        q, lse = tokred.gather_tokens([q, lse], picks, [2, 2])
        weight = (picks >= 0).float()
    weight = weight[:, None].contiguous()
    columns = tokred.attention_columns(q, k, lse, weight=weight, scale=scale).mean(1)
    scores = columns / number.clamp(min=1)
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
    check_grid(x.shape[1], grid)
    place = torch.arange(x.shape[1], device=x.device)
    of, cells = cell_of(place, grid, cell)
    return _merged(x, scores, of, cells, low_tokens(x.shape[1], ratio, cell))


def cell_of(place: Tensor, grid: tuple[int, int], cell: int) -> tuple[Tensor, int]:
    """The cell of cell x cell tokens that each place of the grid (H, W) is in, and their number."""
    columns = -(-grid[1] // cell)
    of = place // grid[1] // cell * columns + place % grid[1] // cell
    return of, -(-grid[0] // cell) * columns


def _merged(x: Tensor, scores: Tensor, of: Tensor, cells: int, low: int) -> Recycled:
    """The `low` tokens of lowest score of x [B, N, C] merged by their cells, i64 [N]."""
    batch, tokens, _ = x.shape
    scores = scores.detach().float()
    merging = mask_of(best(-scores, low, order="score"), tokens)
    # Ranks from the best token on; that of a cell's leader is the smallest of its low tokens.
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(tokens, device=x.device)
    rank = torch.empty_like(order).scatter_(1, order, place.expand(batch, -1))
    smallest = torch.full((batch, cells), tokens, device=x.device)
    member = torch.where(merging, rank, tokens)
    smallest = smallest.scatter_reduce(1, of.expand(batch, -1), member, "amin")
    leader = order.gather(1, smallest.clamp(max=tokens - 1)).to(torch.int32)
    links = torch.where(merging, leader[:, of], identity(x))
    token_map, lengths = map_of_links(links)
    kept = tokens - low + min(low, cells)
    weight = torch.where(merging, scores.clamp(min=1e-30), 1.0)
    merged, _ = tokred.merge(x.contiguous(), token_map, kept, weight=weight.contiguous())
    return Recycled(merged, positions_of(links == identity(x), kept), lengths, token_map)


@dataclass(frozen=True)
class VflowoptOptions(VisualOptions):
    """Options of tokred.patch(model, "vflowopt", ...).

    keep: visual tokens left per image, those that were merged included, at least one for each crop.
    ratio: the share left instead. cell: sides of the cells, in tokens; where there are more cells
    than tokens to keep it is doubled until there are not, which is ours.
    threshold, alpha: see importance. layer: of the encoder, whose attention is read.
    mean, std: of the model's image processor, for the entropy of the image; not read where alpha is
    0. positions, newlines: as VisualOptions has them.
    """

    cell: int = 4
    threshold: float = 1.0
    alpha: float = 1.0
    layer: int = -2
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(1, cell=self.cell)

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> VisualTokens | None:
        """The lowest tokens of every cell of every crop merge.

        Raises:
            ValueError: a budget below the number of crops, or pixels that are not known.
        """
        tokens = call.tokens.shape[1]
        keep, layout = self.count(tokens), call.layout
        if keep == tokens:
            return None
        if layout is None:
            raise ValueError(f"vflowopt reads where in the image tokens are from: {call.why_not}")
        cell, crops = self.cell, layout.num_crops
        of, cells = cell_of(layout.place.long(), layout.crop_grid, cell)
        while cells * crops > keep and cells > 1:
            cell *= 2
            of, cells = cell_of(layout.place.long(), layout.crop_grid, cell)
        if keep < crops:
            raise ValueError(f"keep must be at least 1 for each of {crops} crops, got {keep}")
        of, cells = of + layout.crop.long() * cells, cells * crops
        low = min(tokens, tokens - keep + cells)
        done = _merged(call.tokens, self._importance(call), of, cells, low)
        return call.made(done.tokens, done.positions, done.token_map)

    def _importance(self, call: VisualCall) -> Tensor:
        """f32 [B, N]: importance in every crop by itself."""
        crops, (batch, tokens) = crops_of(call), call.tokens.shape[:2]
        valid = crops.valid(batch)
        received = crops.values(head_mean(call.received_attention(self.layer)))
        mean = received.masked_fill(~valid, 0.0).sum(1, keepdim=True)
        mean = mean / valid.sum(1, keepdim=True).clamp(min=1)
        strong = crops.spread(received > self.threshold * mean, tokens)
        scores = head_mean(call.received_attention(self.layer, queries=strong))
        if self.alpha == 0:
            return scores
        if call.pixels is None:
            raise ValueError(f"vflowopt with an alpha reads the pixels: {call.why_not}")
        entropy = crops.values(call.patch_means(self._entropy(call)))
        share = entropy.masked_fill(~valid, -torch.inf).softmax(1)
        return scores + self.alpha * crops.spread(share, tokens)

    def _entropy(self, call: VisualCall) -> Tensor:
        """f32 [B, M, P] of the encoder's patches."""
        assert call.pixels is not None and call.encoder is not None
        height, width = call.pixels.shape[-2:]
        patches = call.encoder.token_of_patch.shape[1]
        patch = max(math.isqrt(height * width // max(patches, 1)), 1)
        pixels = call.pixels.flatten(0, 1).float() * self.std + self.mean
        return patch_entropy(pixels, patch).view(*call.pixels.shape[:2], -1)


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
    options=VflowoptOptions,
)
