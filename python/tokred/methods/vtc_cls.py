"""VTC-CLS: keep the visual tokens of highest class attention, summed over layers of the encoder.

[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs (arXiv 2412.05819).

From which layer on is an argument of the published code without a default; ours is the middle of
the encoder. Of an image of several crops every crop keeps as many. Encoders without a class token,
which the paper does not have, are ranked by the mean attention that a token receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ._arguments import head_mean
from ._budgets import keep_count
from ._crops import encoder_attention, select_in_crops
from ._method import Family, Method, Needs
from ._picks import best
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall


def ensemble(attentions: Sequence[Tensor]) -> Tensor:
    """f32 [B, N]: the class attention of several layers, averaged over heads, summed over layers.

    Args:
        attentions: of each layer from the first to the last but one, [B, H, N] or [B, N].

    Raises:
        ValueError: no layer, or another shape.
    """
    if not len(attentions):
        raise ValueError("attentions must be those of at least one layer, got none")
    total, *others = map(head_mean, attentions)
    if others:
        total = total + others[0]
    for other in others[1:]:
        total += other
    return total


def select_tokens(
    scores: Tensor, k: int | Tensor, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """The k tokens of highest score.

    Args:
        scores: f32 [B, N], ensemble.
        k: an int, or i32 [B].
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score".

    Returns:
        i32 [B, k] ([B, N] for a k of each row), -1 behind the last.
    """
    return best(scores, k, valid, order)


@dataclass(frozen=True)
class VtcClsOptions(VisualOptions):
    """Options of tokred.patch(model, "vtc_cls", ...).

    keep: visual tokens kept per image. ratio: the share kept instead, rounded down.
    first_layer: of the encoder, whose attention counts, as that of all behind it but the last one;
        negative ones count from the last; the middle one where None.
    positions, newlines: as VisualOptions has them.
    """

    first_layer: int | None = None

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio))

    def encoder_layers(self, num_layers: int) -> list[int]:
        """From first_layer to the last one but one.

        Raises:
            ValueError: there is none.
        """
        first = num_layers // 2 if self.first_layer is None else self.first_layer
        first = first + num_layers if first < 0 else first
        if not 0 <= first < num_layers - 1:
            raise ValueError(
                f"first_layer must be before the last of {num_layers} layers, got "
                f"{self.first_layer}"
            )
        return list(range(first, num_layers - 1))

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop."""
        layers = self.encoder_layers(call.num_layers)
        scores = ensemble([encoder_attention(call, layer) for layer in layers])
        return select_in_crops(call, self.count(call.tokens.shape[1]), select_tokens, scores)


METHOD = Method(
    title="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
    arxiv="2412.05819",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep the visual tokens of highest class attention summed over layers",
    options=VtcClsOptions,
)
