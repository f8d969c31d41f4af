"""DART: a few pivots, and the visual tokens that are least like each of them.

Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (arXiv
2502.11494).

Pivots are the tokens whose keys have the largest L1 norm, of the image and of the text. Where the
pivots' equal parts make more than k tokens, the last pivots add fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._arguments import check_features, check_order, check_scores
from ._lists import check_count
from ._method import Family, Method, Needs
from ._picks import best, close_gaps, in_order, mask_of, rows_of
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall


def key_norms(k: Tensor) -> Tensor:
    """f32 [B, N]: the L1 norms of keys [B, Hkv, N, D], all heads together."""
    return k.detach().abs().sum((1, 3), dtype=torch.float32)


def select_tokens(
    x: Tensor,
    norms: Tensor,
    k: int | Tensor,
    text: Tensor | None = None,
    text_norms: Tensor | None = None,
    text_mask: Tensor | None = None,
    valid: Tensor | None = None,
    order: str = "position",
    pivots: int = 4,
    text_pivots: int = 4,
) -> Tensor:
    """The pivots of the image, then ceil((k - pivots) / all pivots) tokens by each pivot.

    Those are the visual tokens not chosen yet of lowest cosine to the pivot; pivots take turns
    in the order of their norms, those of the image first.

    Args:
        x: [B, N, C], the visual tokens. norms: [B, N], key_norms.
        k: an int, or i32 [B].
        text: [B, T, C], the other tokens, with text_norms [B, T] and text_mask bool [B, T].
        valid: bool [B, N]; padding, which is False, is not kept.
        order: "position", as published, or "score", the order of choosing.
        pivots, text_pivots: how many of each.

    Returns:
        i32 [B, k] ([B, N] for a k of each row), -1 behind the last.

    Raises:
        ValueError: another shape or order, or no pivot.

    O(B N C pivots) time.
    """
    check_count("k", k, per_row=True)
    check_features("x", x)
    check_scores("norms", norms, x, valid)
    check_order(order)
    text_pivots = 0 if text is None else text_pivots
    if min(pivots, text_pivots) < 0 or pivots + text_pivots < 1:
        raise ValueError(
            f"pivots and text_pivots must be at least 0 and one of them more, got {pivots} and "
            f"{text_pivots}"
        )
    x, tokens = x.detach().contiguous(), x.shape[1]
    budget = k if isinstance(k, Tensor) else torch.full((len(x),), k, device=x.device)
    places = tokens if isinstance(k, Tensor) else k
    first = best(norms, budget.clamp(max=pivots), valid, "score", places=min(pivots, places))
    exists, rows = first >= 0, rows_of(x, first)
    left = budget - exists.sum(1)
    if text is not None:
        check_features("text", text, x.shape[0])
        if text_norms is None:
            raise ValueError("text_norms must be given with text")
        check_scores("text_norms", text_norms, text)
        words = best(text_norms, text_pivots, text_mask, "score")
        rows = torch.cat([rows, rows_of(text.detach().to(x.dtype).contiguous(), words)], 1)
        exists = torch.cat([exists, words >= 0], 1)
    part = (left / exists.sum(1).clamp(min=1)).ceil().to(left.dtype)
    # A pivot's own length changes no order.
    length = torch.linalg.vector_norm(x.float(), dim=-1)
    unlike = -(rows.float() @ x.float().mT) / length.clamp(min=1e-12)[:, None]
    picks, free = [first], ~mask_of(first, tokens)
    free = free if valid is None else free & valid
    for i in range(rows.shape[1]):
        share = torch.minimum(part, left).clamp(min=0) * exists[:, i]
        more = best(unlike[:, i], share, free, "score", places=min(places, tokens))
        picks.append(more)
        free, left = free & ~mask_of(more, tokens), left - share
    return in_order(close_gaps(torch.cat(picks, 1), places), order)


@dataclass(frozen=True)
class DartOptions(VisualOptions):
    """Options of tokred.patch(model, "dart", ...).

    keep: visual tokens kept per image. ratio: the share kept instead.
    layer: of the language model, before which tokens are pruned, by its own keys.
    pivots, text_pivots: how many tokens of the image and of the text the others are compared with.
    positions, newlines: as VisualOptions has them.
    """

    layer: int = 0
    pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1:
            raise ValueError(f"pivots must be at least 1, got {self.pivots}")
        if self.text_pivots < 0:
            raise ValueError(f"text_pivots must be at least 0, got {self.text_pivots}")

    def prune_layers(self, num_layers: int) -> list[int]:
        """The layer.

        Raises:
            ValueError: the language model has not as many.
        """
        if not 0 <= self.layer < num_layers:
            raise ValueError(f"layer must be from 0 to {num_layers - 1}, got {self.layer}")
        return [self.layer]

    def prune(self, call: PromptCall) -> Tensor:
        """select_tokens of the prompt's visual tokens, beside its text."""
        norms = key_norms(call.heads("following")[1])
        places = self.count(call.slots.shape[1])
        if self.ratio is None:
            budget = torch.full_like(call.original, self.keep)
        else:
            budget = (call.original.double() * self.ratio).round().clamp(min=1).int()
        picks = select_tokens(
            call.of_visual(call.x, 1),
            call.of_visual(norms),
            budget,
            call.x,
            norms,
            call.text,
            call.is_slot,
            pivots=self.pivots,
            text_pivots=self.text_pivots,
        )
        return picks[:, :places]


METHOD = Method(
    title=(
        "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More"
    ),
    arxiv="2502.11494",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL,),
    status="exact",
    summary="keep pivots, and the visual tokens that are least like each of them",
    options=DartOptions,
)
