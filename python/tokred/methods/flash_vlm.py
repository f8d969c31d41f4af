"""FlashVLM: half of the visual tokens by attention and text, the others without duplicates.

FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models (arXiv 2512.20561).

Of an image of several crops every crop keeps as many. Encoders without a class token, which the
paper does not have, are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ._arguments import check_features, head_mean
from ._budgets import keep_count
from ._crops import crops_of, encoder_attention
from ._lists import check_count
from ._method import Family, Method, Needs
from ._thresholds import percentile, unit_range
from ._visual import VisualOptions
from .vispruner import select_tokens as prune_duplicates

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def text_similarity(
    x: Tensor, text: Tensor, text_mask: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """f32 [B, N] from 0 to 1: how much each visual token resembles the text, sharpened.

    A token's cosines to the words, averaged with weights softmax(cosine / 0.05); of these the
    softmax over the tokens at a temperature of 0.01, to the power 2.5; what lies below the 99.5th
    percentile of the range from 0 to 1 counts a tenth.

    Args:
        x: [B, N, C], the visual tokens. text: [B, T, C], the embeddings of the words.
        text_mask: bool [B, T], False for words that are not there. valid: bool [B, N].

    O(B N T C) time, O(B N T) memory.
    """
    check_features("x", x)
    check_features("text", text, x.shape[0])
    x = x.detach().float()
    words = functional.normalize(text.detach().float(), dim=-1)
    length = torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-12)
    cosine = x @ words.mT / length[..., None]
    logits = cosine / 0.05
    if text_mask is not None:
        logits = logits.masked_fill(~text_mask[:, None], -torch.inf)
    # Without any word nothing resembles the text, and all tokens are alike.
    similar = (cosine * logits.softmax(-1).nan_to_num(0.0)).sum(-1) / 0.01
    if valid is not None:
        similar = similar.masked_fill(~valid, -torch.inf)
    sharp = unit_range(similar.softmax(-1).pow(2.5), valid, 1e-6)
    sharp = torch.where(sharp < percentile(sharp, 99.5, valid), sharp * 0.1, sharp)
    return unit_range(sharp, valid, 1e-6)


def fused_scores(
    attention: Tensor, similarity: Tensor, valid: Tensor | None = None, eta: float = 0.5
) -> Tensor:
    """f32 [B, N]: attention^(1 - eta) * similarity^eta, both of a range from 1e-6 to 1.

    Args:
        attention: [B, H, N] or [B, N], of the class token. similarity: f32 [B, N], text_similarity.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    salient = unit_range(head_mean(attention), valid, 1e-6).clamp(min=1e-6)
    alike = similarity.clamp(min=1e-6)
    return unit_range(((1 - eta) * salient.log() + eta * alike.log()).exp(), valid, 1e-6)


def select_tokens(
    x: Tensor,
    scores: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    step: int = 8,
) -> Tensor:
    """int(k / 2) tokens by score, then the rest of k by VisPruner's rounds without duplicates.

    Args:
        x: [B, N, C], the encoder's features. scores: f32 [B, N], fused_scores.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score": the ones kept by score first.
        step: tokens dropped in a round.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape or order.

    O(B N^3 C / step) time without an N x N matrix.
    """
    check_count("k", k)
    return prune_duplicates(x, scores, k, valid, order, step=step)


@dataclass(frozen=True)
class FlashVlmOptions(VisualOptions):
    """Options of tokred.patch(model, "flash_vlm", ...).

    keep: visual tokens kept per image. ratio: the share kept instead, rounded down.
    eta: how much the text counts beside the attention. layer: of the encoder, whose attention is
    read. positions, newlines: as VisualOptions has them.
    """

    eta: float = 0.5
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio))

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop, by scores in that crop.

        Raises:
            ValueError: the text of the prompt is not known.
        """
        if call.text is None:
            raise ValueError(f"flash_vlm reads the text of the prompt: {call.why_not}")
        batch, tokens = call.tokens.shape[:2]
        count, crops = self.count(tokens), crops_of(call)
        if count >= tokens:
            return None
        valid = crops.valid(batch)

        def of_crops(text: Tensor) -> Tensor:
            return text.repeat_interleave(crops.number, 0)

        similarity = text_similarity(
            crops.values(call.features),
            of_crops(call.text),
            None if call.text_mask is None else of_crops(call.text_mask),
            valid,
        )
        attention = crops.values(encoder_attention(call, self.layer))
        scores = fused_scores(attention, similarity, valid, self.eta)
        k = max(1, count // crops.number)
        return crops.tokens(select_tokens(crops.values(call.encoder_features), scores, k, valid))


METHOD = Method(
    title="FlashVLM: Text-Guided Visual Token Selection for Large Multimodal Models",
    arxiv="2512.20561",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep visual tokens by class attention and text, and others that are no duplicates",
    options=FlashVlmOptions,
)
