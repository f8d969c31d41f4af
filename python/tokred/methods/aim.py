"""AIM: merge the tokens of every frame to a quarter, rank what is left by PageRank inside the LLM.

AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (arXiv 2412.03248).

Merged tokens are plain means, of means in the second step; sizes are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import tokred
from tokred.schedule import resolve

from ._arguments import features_of
from ._lists import check_count
from ._maps import identity
from ._method import Family, Method, Needs
from ._prompts import StagedOptions
from ._video import VideoTokens, check_video, frame_maps_in_a_row

if TYPE_CHECKING:
    from tokred.patching import PromptCall, VisualCall, VisualTokens


def merge_frames(x: Tensor, shares: tuple[float, ...] = (0.5, 0.25)) -> VideoTokens:
    """Merges within every frame, by the similarity of its features, in several steps.

    Args:
        x: [B, F, N, C], the projected tokens that a language model would read.
        shares: int(N * share) tokens of a frame merge in each step, at most half of what is left;
            a half and a quarter leave a quarter.

    Returns:
        VideoTokens with tokens [B, F * M, C]; those of a frame that have not merged come first.

    Raises:
        ValueError: x is no video, or a share outside [0, 1).
    """
    batch, frames, tokens, _ = check_video(x)
    rows, total = x.flatten(0, 1).contiguous(), None
    for share in shares:
        if not 0 <= share < 1:
            raise ValueError(f"shares must be in [0, 1), got {share}")
        r = resolve(int(tokens * share), rows.shape[1], 0)
        if r == 0:
            continue
        token_map = tokred.bipartite_soft_matching(rows.detach(), r)
        rows, _ = tokred.merge(rows, token_map, rows.shape[1] - r, mode="plain_mean")
        total = token_map if total is None else tokred.compose(token_map, total)
    left = rows.shape[1]
    total = identity(rows) if total is None else total
    return VideoTokens(
        rows.reshape(batch, frames * left, -1), frame_maps_in_a_row(total, left, frames)
    )


def importance(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    causal: bool = True,
    iterations: int = 5,
    temperature: float = 0.1,
    mask: Tensor | None = None,
) -> Tensor:
    """How important every token is to the others in a layer of the language model.

    PageRank without damping on the attention of every head, its logits divided by the temperature;
    the root of the sum over heads of the squares is the published score up to a constant factor.

    Args:
        q: [B, H, N, D]. k: [B, Hkv, N, D]. scale: of the logits, 1 / sqrt(D) where None.
        mask: bool [B, N], False for padding, or as of pagerank.

    Returns:
        f32 [B, N], the root of the mean over the heads of the squares.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ranks = tokred.pagerank(q, k, iterations, scale=scale / temperature, causal=causal, mask=mask)
    return ranks.square().mean(1).sqrt()


def keep_rate(layer: int, first: int = 13, step: float = 0.125) -> float:
    """The share of the image's tokens that a layer of the language model keeps.

    1 up to layer `first`, then by `step` less from layer to layer, down to 0.
    """
    return min(1.0, max(0.0, 1.0 - step * (layer - first)))


def merge_to(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merges the tokens of an image, by the similarity of their features, until k are left.

    Args:
        x: [B, N, C]. k: from 1 to N. Every step merges at most half of what is left.

    Returns:
        (tokens [B, k, C], plain means of means, those that have not merged in the last step first;
        token_map i32 [B, N]).

    Raises:
        ValueError: another k.
    """
    check_count("k", k, minimum=None)
    if not 1 <= k <= max(x.shape[1], 1):
        raise ValueError(f"k must be from 1 to {x.shape[1]}, got {k}")
    rows, total = x.contiguous(), identity(x)
    while (r := min(rows.shape[1] - k, rows.shape[1] // 2)) > 0:
        token_map = tokred.bipartite_soft_matching(features_of(rows), r)
        rows, _ = tokred.merge(rows, token_map, rows.shape[1] - r, mode="plain_mean")
        total = tokred.compose(token_map, total)
    return rows, total


def first_members(token_map: Tensor, slots: int) -> Tensor:
    """i32 [B, slots]: the first token of every slot, -1 where there is none."""
    batch, tokens = token_map.shape
    first = torch.full((batch, slots + 1), tokens, dtype=torch.int32, device=token_map.device)
    place = torch.where(token_map < 0, slots, token_map).long()
    first = first.scatter_reduce(1, place, identity(token_map), "amin")[:, :-1]
    return torch.where(first == tokens, -1, first)


def keep(scores: Tensor, rate: float, protected: Tensor, present: Tensor | None = None) -> Tensor:
    """bool [B, N]: the tokens that stay in a layer.

    Args:
        scores: f32 [B, N], importance. rate: keep_rate; int(rate * V) of the V tokens that are not
            protected stay, those of the highest scores.
        protected: bool [B | 1, N], those that stay in any case, such as text.
        present: bool [B, N], those that earlier layers have kept; all where None.
    """
    protected = protected.expand_as(scores)
    may = ~protected if present is None else ~protected & present
    budget = ((~protected).sum(1).double() * rate).to(torch.int32)
    ranked = scores.masked_fill(~may, -torch.inf)
    _, chosen = tokred.topk(ranked, scores.shape[1], row_k=budget)
    place = torch.where(chosen >= 0, chosen, scores.shape[1]).long()
    spare = torch.cat([protected, protected[:, :1]], 1)
    return spare.scatter(1, place, True)[:, :-1]


@dataclass(frozen=True)
class AimOptions(StagedOptions):
    """Options of tokred.patch(vlm, "aim", ...).

    keep: tokens that the language model is given of every image, the others merge into them; 144 of
    LLaVA's 576, a quarter, as published. ratio: their share, in place of keep.
    last: the share of these that is left behind the last stage; every stage drops equally many.
    stages: the layers before which tokens are dropped; 14 to 21 of 32 where None, an eighth before
    each, as published for LLaVA.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    keep: int = 144
    last: float = 0.0

    published: ClassVar[tuple[int, ...]] = tuple(range(14, 22))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.last <= 1:
            raise ValueError(f"last must be in [0, 1], got {self.last}")

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """keep_rate of the number of tokens, as far as down to `last`."""
        return tokens * (1 - (1 - self.last) * (stage + 1) / of)

    def reduce_visual(self, call: VisualCall) -> VisualTokens:
        """merge_to."""
        tokens, token_map = merge_to(call.tokens, self.count(call.tokens.shape[1]))
        return call.made(tokens, first_members(token_map, tokens.shape[1]), token_map)

    def prune(self, call: PromptCall) -> Tensor:
        """The tokens of highest importance in the attention of the layer before."""
        q, k = call.heads("previous")
        return self.keep_best(call, importance(q, k, call.scale, mask=call.valid))


METHOD = Method(
    title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
    arxiv="2412.03248",
    family=Family.MERGE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="merge the tokens of every frame to a quarter, keep fewer from layer to layer after it",
    options=AimOptions,
)
