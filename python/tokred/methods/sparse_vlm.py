"""SparseVLM: words that concern the image rate its tokens; what is dropped comes back in clusters.

SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (arXiv
2410.04417).

How many tokens each stage keeps is published for averages of 64, 128 and 192 of LLaVA's 576 tokens;
other numbers keep as many as 64 in proportion, which is ours, and `adaptive_count` has the paper's
rule by rank. An approximate version: in a patched model the tokens that come back take the places
of the centres of their clusters, where the release appends them to those that are kept; the release
adds noise to the densities of tokens that are clustered, here equal ones go by position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import tokred

from ._arguments import check_features, features_of
from ._method import Family, Method, Needs
from ._picks import best, mask_of, rows_of
from ._prompts import StagedOptions, attention_from

if TYPE_CHECKING:
    from tokred.patching import PromptCall, PromptTokens

TOKENS = 576  # of LLaVA-1.5, for which the table is
COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
CARRIED = "sparse_vlm.raters"
ROWS = 512  # visual tokens that are compared with the words at a time


def text_raters(
    visual: Tensor, text: Tensor, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
) -> Tensor:
    """The words that concern the image more than the mean one does.

    A word's relevance is its mean weight when every visual token chooses among the words, by the
    softmax of the dot products of their embeddings.

    Args:
        visual: [B, N, C], text: [B, T, C], the embeddings that the language model is given.
        visual_mask: bool [B, N], text_mask: bool [B, T], False for padding.

    Returns:
        bool [B, T]; all words of a row where none is above the mean.

    Complexity: O(B N T C), memory O(B T).
    """
    for name, x in (("visual", visual), ("text", text)):
        check_features(name, x, visual.shape[0])
    there = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    there = there if text_mask is None else text_mask
    relevance = torch.zeros(text.shape[:2], device=text.device)
    words = features_of(text).transpose(1, 2)
    for first in range(0, visual.shape[1], ROWS):
        logits = (features_of(visual[:, first : first + ROWS]) @ words).float()
        share = logits.masked_fill(~there[:, None], -torch.inf).softmax(-1).nan_to_num()
        if visual_mask is not None:
            share = share * visual_mask[:, first : first + ROWS, None]
        relevance += share.sum(1)
    count = there.sum(-1, keepdim=True).clamp(min=1)
    mean = relevance.masked_fill(~there, 0).sum(-1, keepdim=True) / count
    above = (relevance > mean) & there
    return torch.where(above.any(-1, keepdim=True), above, there)


def rated_scores(
    q: Tensor, k: Tensor, raters: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """The attention that every token receives from the raters, mean over heads and raters.

    Args:
        q: [B, Hq, L, D], k: [B, Hkv, L, D], of the prompt, causal. raters: bool [B, L].
        scale: 1 / sqrt(D) where None. mask: bool [B, L], False for padding.

    Returns:
        f32 [B, L], of which those of the visual tokens count.
    """
    return attention_from(raters, q, k, scale, mask)


def adaptive_count(attention: Tensor, weight: float = 1.0, valid: Tensor | None = None) -> Tensor:
    """How many visual tokens stay by the paper's rule: all but weight * (N - rank).

    Args:
        attention: [B, T, N], of the raters on the visual tokens, mean over heads; 0 in rows of
            padding.
        weight: of what is redundant by rank. valid: bool [B, N].

    Returns:
        i32 [B].
    """
    attention = attention.detach().float()
    if valid is not None:
        attention = attention * valid[:, None]
        count = valid.sum(-1)
    else:
        count = torch.full(attention.shape[:1], attention.shape[2], device=attention.device)
    redundant = weight * (count - torch.linalg.matrix_rank(attention)).clamp(min=0)
    return (count - redundant.floor().long()).clamp(min=0).to(torch.int32)


def sparse_vlm(
    scores: Tensor, k: int | Tensor, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """The k visual tokens of highest score, which one stage keeps.

    Args:
        scores: [B, N], rated_scores at the visual tokens that are left.
        k: tokens that stay, or integers [B]. valid: bool [B, N]. order: "position" or "score".

    Returns:
        i32 [B, k], or [B, N] for a k of each row; -1 behind the last.
    """
    return best(scores, k, valid, order)


def recycle(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    share: float = 0.3,
    group: int = 10,
    valid: Tensor | None = None,
) -> Tensor:
    """What comes back of the dropped tokens: the means of clusters of those of highest score.

    Of D dropped tokens the int(share D) + 1 of highest score are clustered by density peaks, as
    int(that / group) + 1 clusters. The published place for them is behind the kept visual tokens.

    Args:
        x: [B, N, C]. scores: [B, N]. kept: i32 [B, k], the tokens that stay.
        valid: bool [B, N]; padding is not recycled. The number of clusters counts it.

    Returns:
        [B, M, C] in x's dtype, zeros where a row has fewer clusters.

    Raises:
        ValueError: x that is not [B, N, C], a share outside [0, 1] or a group below 1.

    Complexity: O(B N^2 C) for the clusters, without an N x N matrix.
    """
    check_features("x", x)
    return recycled(x, scores, kept, share, group, valid)[1]


def recycled(
    x: Tensor,
    scores: Tensor,
    kept: Tensor,
    share: float = 0.3,
    group: int = 10,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """recycle, and the tokens that are the centres of the clusters: (i32 [B, M], [B, M, C])."""
    if not 0 <= share <= 1 or group < 1:
        raise ValueError(f"share must be in [0, 1] and group at least 1, got {share} and {group}")
    tokens = x.shape[1]
    dropped = ~mask_of(kept, tokens)
    dropped = dropped if valid is None else dropped & valid
    most = max(tokens - kept.shape[1], 0)
    if most == 0:
        return kept[:, :0], x[:, :0]
    members = min(int(most * share + 1e-9) + 1, most)
    again = mask_of(best(scores, members, dropped), tokens)
    clusters = members // group + 1
    centers, assignment = tokred.dpc_knn(features_of(x), clusters, k=clusters, mask=again)
    return centers, tokred.merge(x.contiguous(), assignment, clusters, mode="plain_mean")[0]


def _raters_of(call: PromptCall) -> Tensor:
    """bool [B, L]: text_raters among the words behind the images."""
    batch, length = call.valid.shape
    # One row has no more words than it has places beside its visual tokens.
    capacity = length - call.slots.shape[1] if batch == 1 else length
    words, _ = tokred.compact(call.after_images, capacity=capacity)
    there = words >= 0
    text = rows_of(features_of(call.x), words)
    raters = text_raters(call.of_visual(call.x, dim=1), text, call.is_slot, there)
    return mask_of(torch.where(raters, words, -1), length)


@dataclass(frozen=True)
class SparseVlmOptions(StagedOptions):
    """Options of tokred.patch(vlm, "sparse_vlm", ...).

    keep: visual tokens of a prompt that the layers have on average, with the published numbers for
    each stage of 64, 128 and 192; others are those of 64 in proportion. ratio: that share of
    LLaVA's 576 in proportion to what a prompt has, in place of keep.
    recycle: whether some of the dropped tokens come back as means of clusters, beside those kept.
    stages: the three layers before which tokens are dropped; 3, 7 and 16 of 32 where None, which
    come behind the published 2, 6 and 15. The words are those behind the images; where there are
    none, no token is better than another, and the first ones stay.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    recycle: bool = True

    published: ClassVar[tuple[int, ...]] = (3, 7, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None and len(self.stages) != len(self.published):
            raise ValueError(f"stages must be three layers, got {self.stages}")

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """From the table, or in proportion."""
        if self.ratio is None:
            return tokens.clamp(max=self._count(self.keep)[stage])
        share = 1.0 if self.ratio == 1 else self._count(self.ratio * TOKENS)[stage] / TOKENS
        return tokens * min(share, 1.0)

    def prune_layers(self, num_layers: int) -> list[int]:
        """The first layer, where the raters are chosen, and those of the stages."""
        return sorted({0, *super().prune_layers(num_layers)})

    def prune(self, call: PromptCall) -> Tensor | PromptTokens | None:
        """Chooses the raters before the first layer; later tokens, by what these attend to."""
        if call.layer == 0:
            call.carried[CARRIED] = _raters_of(call)
            return None
        q, k = call.heads("previous")
        scores = rated_scores(q, k, call.carried[CARRIED], call.scale, call.valid)
        kept = self.keep_best(call, scores)
        if not self.recycle:
            return kept
        x, scores = call.of_visual(call.hidden, dim=1), call.of_visual(scores)
        counts = torch.stack([call.is_slot.sum(1), (kept >= 0).sum(1)], 1).tolist()
        rows = [
            recycled(x[i : i + 1, :tokens], scores[i : i + 1, :tokens], kept[i : i + 1, :left])
            for i, (tokens, left) in enumerate(counts)
        ]
        made, tokens = (
            pad_sequence([row[0] for row in part], batch_first=True, padding_value=fill)
            for part, fill in zip(zip(*rows, strict=True), (-1, 0), strict=True)
        )
        return call.made(kept, made, tokens)

    def _count(self, average: float) -> tuple[float, ...]:
        if average in COUNTS:
            return COUNTS[int(average)]
        return tuple(count * average / 64 for count in COUNTS[64])


METHOD = Method(
    title=("SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference"),
    arxiv="2410.04417",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="approximate",
    summary="in three stages keep the visual tokens that words about the image attend to most",
    options=SparseVlmOptions,
)
