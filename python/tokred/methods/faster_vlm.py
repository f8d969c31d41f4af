"""FasterVLM: keep the visual tokens to which the encoder's class token attends most.

[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster
(arXiv 2412.01818).

Of an image of several crops every crop keeps as many. Encoders without a class token, which the
paper does not have, are ranked by the mean attention that a token receives. The same rule drops
tokens between the layers of a vision encoder by itself, which the paper does not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ._arguments import head_mean
from ._budgets import keep_count
from ._crops import encoder_attention, select_in_crops
from ._dropping import best_tokens, chosen_layers, finite
from ._method import Family, Method, Needs
from ._picks import best
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import ReductionCall, VisualCall


def select_tokens(
    attention: Tensor, k: int | Tensor, valid: Tensor | None = None, order: str = "position"
) -> Tensor:
    """The k tokens of highest class attention, averaged over the heads.

    Args:
        attention: [B, H, N] or [B, N], of the class token over the patches in the encoder's last
            layer but one; dividing by a sum with or without the class token changes nothing.
        k: an int, or i32 [B].
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score".

    Returns:
        i32 [B, k] ([B, N] for a k of each row), -1 behind the last.

    Raises:
        ValueError: another shape or order.

    O(B H N) time.
    """
    return best(head_mean(attention), k, valid, order)


@dataclass(frozen=True)
class FasterVlmOptions(VisualOptions):
    """Options of tokred.patch(model, "faster_vlm", ...).

    keep: visual tokens kept per image. ratio: the share kept instead, rounded down.
    layer: of the encoder, whose attention is read; negative ones count from the last.
    at: the layers of a vision encoder by itself that drop tokens, each to keep tokens or the ratio
    of its own; a fourth, a half and three fourths in where None.
    positions, newlines: as VisualOptions has them.
    """

    layer: int = -2
    at: Sequence[int] | None = None

    adapters = ("vision_language", "timm", "transformers")

    def count(self, tokens: int) -> int:
        return max(1, keep_count(tokens, self.keep, self.ratio))

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one that is read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> Tensor | None:
        """select_tokens in every crop."""
        attention = encoder_attention(call, self.layer)
        return select_in_crops(call, self.count(call.tokens.shape[1]), select_tokens, attention)

    def layers(self, num_layers: int) -> list[int]:
        """The layers `at`, unless they keep all tokens."""
        return chosen_layers(self.at, num_layers) if self.ratio != 1 else []

    def plan(self, call: ReductionCall) -> Tensor | None:
        """The tokens of highest attention in the layer itself, in their order."""
        patches = call.tokens.shape[1] - call.num_prefix
        count = self.count(patches)
        if count >= patches:
            return None
        seen = call.class_attention() if call.num_prefix else call.received_attention()
        return best_tokens(finite(seen.mean(1)), count, call.num_prefix)


METHOD = Method(
    title=(
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM "
        "Inference Faster"
    ),
    arxiv="2412.01818",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.VISION_ENCODER),
    status="exact",
    summary="keep the visual tokens of highest class attention",
    options=FasterVlmOptions,
)
