"""VisionZip: keep the visual tokens of most attention, merge the rest into evenly spaced ones.

VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467).

Dominant tokens are those to which the class token attends most in the layer before the encoder's
last; in encoders without one, those that receive most attention. Of the others every n-th is a
contextual token, into which those of the most similar keys (mean over the heads) merge.

An approximate version: here tokens merge after the projector, as equal means of their group, over
all crops of an image. The authors merge before it, crop by crop, and also keep the class token,
which models of transformers drop. Contextual tokens take the place of the token they are made
around.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import tokred

from ._crops import encoder_attention
from ._maps import identity, map_of_links
from ._method import Family, Method, Needs
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import VisualCall, VisualTokens


def visionzip_map(importance: Tensor, keys: Tensor, dominant: int, contextual: int) -> Tensor:
    """The map of one image's tokens.

    Args:
        importance: f32 [B, N], ties going to the lower index. keys: [B, N, D].
        dominant, contextual: tokens that stay by themselves, and that others merge into; together
            at most N.

    Returns:
        i32 [B, N]: the token that each one becomes a part of, itself for those that stay. Without
        contextual tokens, others are dropped: -1.

    O(B N (contextual) D) time, O(B N) memory.
    """
    batch, tokens = importance.shape
    device = importance.device
    own = identity(keys)
    lowest = torch.finfo(torch.float32).min
    _, kept = tokred.topk(importance.nan_to_num(lowest, None, lowest), dominant)
    is_rest = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    is_rest.scatter_(1, kept.long(), False)
    links = torch.where(is_rest, -1, own)
    if contextual == 0:
        return links
    count = tokens - dominant
    rest, _ = tokred.compact(is_rest, capacity=count)
    step = count // contextual
    is_target = torch.zeros(count, dtype=torch.bool, device=device)
    is_target[torch.arange(contextual, device=device) * step] = True
    targets, others = rest[:, is_target], rest[:, ~is_target]
    links = links.scatter(1, targets.long(), targets)
    if others.shape[1] == 0:
        return links
    (a,), (b,) = tokred.gather_tokens([keys], others), tokred.gather_tokens([keys], targets)
    _, best = tokred.match(a, b)
    # A key without direction is similar to none, and goes to the first.
    return links.scatter(1, others.long(), targets.gather(1, best.clamp(min=0).long()))


@dataclass(frozen=True)
class VisionzipOptions(VisualOptions):
    """Options of tokred.patch(model, "visionzip", ...).

    keep: tokens per image. ratio: the share kept, in place of keep. contextual_share: of the kept
    tokens, those that the others merge into; published are 10 of 64. layer: of the encoder, whose
    attention and keys are read. positions, newlines: see VisualOptions.
    """

    contextual_share: float = 10 / 64
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual_share < 1:
            raise ValueError(f"contextual_share must be in [0, 1), got {self.contextual_share}")

    def encoder_layers(self, num_layers: int) -> list[int]:
        """The one whose attention and keys are read."""
        return [self.layer]

    def reduce_visual(self, call: VisualCall) -> VisualTokens | None:
        """visionzip_map, and the means of its groups."""
        tokens = call.tokens.shape[1]
        keep = self.count(tokens)
        if keep == tokens:
            return None
        contextual = min(round(keep * self.contextual_share), keep - 1)
        importance = encoder_attention(call, self.layer)
        keys = call.mean_keys(self.layer)
        links = visionzip_map(importance, keys, keep - contextual, contextual)
        stays, _ = tokred.compact(links == identity(call.tokens), capacity=keep)
        token_map, _ = map_of_links(links)
        merged, _ = tokred.merge(call.tokens.contiguous(), token_map, keep)
        return call.made(merged, stays, token_map)


METHOD = Method(
    title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arxiv="2412.04467",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="approximate",
    summary="keep the visual tokens the class token attends to, merge the rest into a few others",
    options=VisionzipOptions,
)
