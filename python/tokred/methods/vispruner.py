"""VisPruner: half of the visual tokens by class attention, the others by removing duplicates.

Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (arXiv
2412.01818).

Of an image of several crops every crop keeps as many. Encoders without a class token, which the
paper does not have, are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ._arguments import check_features, check_order, check_scores, features_of, head_mean
from ._crops import encoder_attention, select_in_crops
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, close_gaps, in_order
from ._rounds import prune_in_rounds
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def select_tokens(
    x: Tensor,
    attention: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    important: float = 0.5,
    residual: str = "score",
    step: int = 8,
) -> Tensor:
    """int(k * important) tokens by attention, then the rest of k by rounds without duplicates.

    The rounds (`tokred.methods._rounds.prune_in_rounds`) compare every second of the other
    tokens with those between them, and drop the most similar ones.

    Args:
        x: [B, N, C], the encoder's features. attention: [B, H, N] or [B, N], of the class token.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score": the important ones first.
        important: in [0, 1].
        residual: the order in which the others are compared: "score", by descending attention and
            then as each round leaves them, as published; or "position", as in later releases.
        step: tokens dropped in a round.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape, order or share.

    O(B N^3 C / step) time without an N x N matrix.
    """
    check_count("k", k)
    check_features("x", x)
    check_order(order)
    if not 0 <= important <= 1:
        raise ValueError(f"important must be in [0, 1], got {important}")
    if residual not in ("score", "position"):
        raise ValueError(f'residual must be "score" or "position", got {residual!r}')
    scores, tokens = head_mean(attention), x.shape[1]
    check_scores("attention", scores, x, valid)
    ranked = best(scores, tokens, valid, "score")
    first = min(int(k * important), tokens)
    rest = ranked[:, first:]
    if residual == "position":
        rest = in_order(rest, "position")
    others = prune_in_rounds(features_of(x), rest, k - first, step, residual == "score")
    picks = torch.cat([ranked[:, :first], others], 1)
    picks = torch.nn.functional.pad(picks, (0, k - picks.shape[1]), value=-1)
    # Where a row is short its -1 stand between the two parts.
    return in_order(picks, order) if order == "position" else close_gaps(picks)


@dataclass(frozen=True)
class VisprunerOptions(VisualOptions):
    """Options of tokred.patch(model, "vispruner", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    important: the part of them kept by attention. residual: "score" or "position", the order in
    which the others are compared. layer: of the encoder, whose attention is read.
    positions, newlines: as VisualOptions has them.
    """

    important: float = 0.5
    residual: Literal["score", "position"] = "score"
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"important must be in [0, 1], got {self.important}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop, by the encoder's features."""

        def select(x: Tensor, attention: Tensor, k: int, valid: Tensor) -> Tensor:
            return select_tokens(
                x, attention, k, valid, important=self.important, residual=self.residual
            )

        attention = encoder_attention(call, self.layer)
        count = self.count(call.tokens.shape[1])
        return select_in_crops(call, count, select, call.encoder_features, attention)


METHOD = Method(
    title=(
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs"
    ),
    arxiv="2412.01818",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep visual tokens by class attention, and others that are no duplicates",
    options=VisprunerOptions,
)
