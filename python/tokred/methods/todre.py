"""ToDRE: keep visual tokens far from each other, drop all once the text attends to them little.

ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance (arXiv 2505.18757).

An approximate version, after the abstract. Its first version picks by the minimum distance to what
is kept, its second by the sum of distances; the distance (1 - cosine) and the first pick (the token
of largest norm) are ours, and so is how the second stage measures: the attention that the words
behind the image give to visual tokens, against that to the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import tokred

from ._arguments import check_features, features_of
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import in_order
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall, VisualCall


def select_tokens(
    x: Tensor,
    k: int,
    valid: Tensor | None = None,
    order: str = "position",
    rule: str = "sum",
    start: Tensor | None = None,
) -> Tensor:
    """Greedy diversity by cosine distance.

    Args:
        x: [B, N, C], the visual tokens.
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", or "score", the order of picking.
        rule: "sum": the token of the largest sum of distances to those kept, the paper's second
            version; "min": of the largest minimum distance, its first.
        start: i32 [B], the first pick; the token of largest norm where None.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: another shape, order or rule.

    At most O(B N k C) time; O(B N C) memory.
    """
    check_count("k", k)
    check_features("x", x)
    if rule not in ("sum", "min"):
        raise ValueError(f'rule must be "sum" or "min", got {rule!r}')
    picks = tokred.greedy_select(
        features_of(x),
        k,
        "maxsum" if rule == "sum" else "kcenter",
        start=start,
        mask=valid,
        first="norm",
    )
    return in_order(picks, order)


def visual_share(received: Tensor, visual: Tensor, text: Tensor) -> Tensor:
    """f32 [B]: the attention to visual tokens over that to the text.

    Args:
        received: [B, H, N] or [B, N], the mean attention that each token receives from the words
            behind the image. visual, text: bool [B, N].
    """
    received = received.float()
    received = received.mean(1) if received.dim() == 3 else received
    tiny = torch.finfo(torch.float32).tiny
    return (received * visual).sum(1) / (received * text).sum(1).clamp(min=tiny)


@dataclass(frozen=True)
class TodreOptions(VisualOptions):
    """Options of tokred.patch(model, "todre", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    rule: "sum" or "min", see select_tokens.
    threshold: a row whose visual_share is below it loses its visual tokens in one of `checks`
    layers, evenly spread over the second half of the language model; None leaves all in.
    positions, newlines: as VisualOptions has them.
    """

    rule: Literal["sum", "min"] = "sum"
    threshold: float | None = None
    checks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checks < 1:
            raise ValueError(f"checks must be at least 1, got {self.checks}")

    def reduce_visual(self, call: VisualCall) -> Tensor:
        """select_tokens of the whole image."""
        return select_tokens(call.features, self.count(call.tokens.shape[1]), rule=self.rule)

    def prune_layers(self, num_layers: int) -> list[int]:
        """The layers before which the share is measured; none without a threshold."""
        if self.threshold is None:
            return []
        half = (num_layers + 1) // 2
        rest = num_layers - half
        return sorted({half + rest * i // self.checks for i in range(self.checks) if rest})

    def prune(self, call: PromptCall) -> Tensor:
        """All visual tokens, or none, of every row."""
        received = call.received_attention(call.after_images).mean(1)
        share = visual_share(received, call.visual, call.text)
        slots = torch.arange(call.slots.shape[1], dtype=torch.int32, device=share.device)
        smallest = -torch.inf if self.threshold is None else self.threshold
        stays = call.is_slot & (share >= smallest)[:, None]
        return torch.where(stays, slots, -1)


METHOD = Method(
    title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
    arxiv="2505.18757",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="approximate",
    summary="keep visual tokens far from each other, drop all once the text attends to them little",
    options=TodreOptions,
)
