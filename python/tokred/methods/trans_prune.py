"""TransPrune: rank visual tokens by how layers change them and by what the instruction attends to.

TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (arXiv 2507.20630).

The release weighs the change in every block by its sum over all tokens of the batch, so that a
row's tokens depend on the other rows; here the sum is over the row's own tokens, of text and image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import tokred

from ._arguments import features_of
from ._method import Family, Method, Needs
from ._picks import best
from ._prompts import StagedOptions

if TYPE_CHECKING:
    from tokred.patching import LayerStates, PromptCall

CARRIED = "trans_prune.variation"


def transition_variation(before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much one block changes each token, in length and in direction.

    |after| / |before| times the token's share of the sum of exp(1 - cosine) over its row.

    Args:
        before, after: [B, N, C], what the block was given, normalised, and what it gave, before
            that is added to the residual stream; all tokens of the prompt.
        mask: bool [B, N]; padding counts in no sum and gets 0.

    Returns:
        f32 [B, N]. One read of both.
    """
    ratio, cosine = tokred.transition_stats(features_of(before), features_of(after))
    turn = (1 - cosine).exp()
    if mask is not None:
        turn, ratio = turn.masked_fill(~mask, 0), ratio.masked_fill(~mask, 0)
    total = turn.sum(-1, keepdim=True)
    return ratio * turn / total.clamp(min=torch.finfo(torch.float32).tiny)


def trans_prune(
    variation: Tensor,
    attention: Tensor,
    k: int | Tensor,
    valid: Tensor | None = None,
    order: str = "position",
) -> Tensor:
    """The k visual tokens whose shares of variation and of attention are largest in sum.

    Args:
        variation: f32 [B, N], transition_variation summed over blocks, at the visual tokens.
        attention: f32 [B, N], what they receive from the instruction, mean over heads and queries.
        k: tokens that stay, or integers [B]. valid: bool [B, N]. order: "position" or "score".

    Returns:
        i32 [B, k], or [B, N] for a k of each row; -1 behind the last.
    """
    return best(scores(variation, attention, valid), k, valid, order)


def scores(variation: Tensor, attention: Tensor, valid: Tensor | None = None) -> Tensor:
    """f32 [B, N]: each part divided by its sum over the row's valid tokens + 1e-8, and added."""

    def share(x: Tensor) -> Tensor:
        x = x.float() if valid is None else x.float().masked_fill(~valid, 0)
        return x / (x.sum(-1, keepdim=True) + 1e-8)

    return share(variation) + share(attention)


@dataclass(frozen=True)
class TransPruneOptions(StagedOptions):
    """Options of tokred.patch(vlm, "trans_prune", ...).

    keep: visual tokens of a prompt that are left behind the last stage; 72 of LLaVA's 576, an
    eighth, as published. ratio: their share, in place of keep. The first stage drops one seventh of
    those that go, the second two more, the third the rest: 7/8, 5/8 and 1/8 stay of an eighth;
    of other numbers of stages they are dropped in equal parts.
    stages: the layers before which tokens are dropped; 7, 9 and 12 of 32 where None. Variation is
    summed from the layer before the first stage to the one before the last.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    keep: int = 72

    published: ClassVar[tuple[int, ...]] = (7, 9, 12)

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """Straight lines between the published shares."""
        gone = (1 / 7, 3 / 7, 1.0)[stage] if of == 3 else (stage + 1) / of
        return tokens - (tokens - self.end(tokens)) * gone

    def watch(self, num_layers: int) -> list[int]:
        """From the layer before the first stage to the one before the last."""
        layers = self.prune_layers(num_layers)
        return list(range(max(layers[0] - 1, 0), layers[-1])) if layers else []

    def observe(self, states: LayerStates) -> None:
        """Adds the layer's two variations to those of the layers before."""
        parts = (states.attention_in, states.attention_out), (states.mlp_in, states.mlp_out)
        for part in parts:
            here, so_far = transition_variation(*part, states.valid), states.carried.get(CARRIED)
            states.carried[CARRIED] = here if so_far is None else so_far + here

    def prune(self, call: PromptCall) -> Tensor:
        """By the variation so far, and the attention of the text behind the image in this layer."""
        attention = call.received_attention(call.after_images, "following").mean(1)
        variation = call.carried.get(CARRIED)
        seen = call.of_visual(attention)
        changed = torch.zeros_like(seen) if variation is None else call.of_visual(variation)
        return trans_prune(changed, seen, self.budget(call), call.is_slot)


METHOD = Method(
    title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
    arxiv="2507.20630",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="in three stages keep visual tokens that layers change and the text attends to most",
    options=TransPruneOptions,
)
