"""What the methods that prune visual tokens inside a language model share: stages and budgets."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

import tokred

from ._budgets import keep_count
from ._picks import best
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall

DEPTH = 32  # layers of the language models that the papers give their layers for


def geometric(tokens: Tensor, end: Tensor, progress: float) -> Tensor:
    """tokens at progress 0, end at progress 1, by equal factors between them; end <= tokens."""
    return tokens ** (1.0 - progress) * end**progress


def attention_from(
    queries: Tensor, q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None
) -> Tensor:
    """f32 [B, L]: the attention every token gets from chosen queries, mean over heads and queries.

    Args:
        queries: bool [B, L]. q: [B, Hq, L, D], k: [B, Hkv, L, D], of the prompt, causal.
        scale: 1 / sqrt(D) where None. mask: bool [B, L], False for padding.
    """
    weight = (queries if mask is None else queries & mask).float()[:, None]
    columns = tokred.attention_columns(
        q.detach(),
        k.detach(),
        weight=weight,
        causal=True,
        scale=scale,
        mask=None if mask is None else mask[:, None, None],
    )
    return columns.mean(1) / weight.sum(-1).clamp(min=1)


def best_share(
    scores: Tensor, ratio: float, keep: int | None, valid: Tensor | None, order: str
) -> Tensor:
    """The `keep` tokens of highest score, or int(ratio * N); of a row with padding of its own N.

    Returns:
        i32 [B, k], -1 behind the last.

    Raises:
        ValueError: a ratio outside [0, 1], keep below 0, or another order.
    """
    places = keep_count(scores.shape[1], keep, None if keep is not None else ratio)
    if keep is not None or valid is None:
        return best(scores, places, valid, order)
    row_k = (valid.sum(1).double() * ratio + 1e-9).floor().to(torch.int32)
    return best(scores, row_k, valid, order)[:, :places]


@dataclass(frozen=True)
class StagedOptions(VisualOptions):
    """Options of methods that prune in stages.

    keep: visual tokens of a prompt that are left behind the last stage. ratio: their share, in
    place of keep. stages: the layers before which tokens are pruned, ascending; where None those of
    the paper, in proportion to the number of layers.
    """

    stages: tuple[int, ...] | None = None

    published: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.stages
        if stages is None:
            return
        whole = isinstance(stages, tuple) and all(type(layer) is int for layer in stages)
        if not whole or not stages or stages[0] < 0 or sorted({*stages}) != [*stages]:
            raise ValueError(f"stages must be a tuple of ascending layers, got {stages!r}")

    @abstractmethod
    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """How many of each prompt's visual tokens, f64 [B], are left behind a stage, of so many;
        it is rounded down."""

    def end(self, tokens: Tensor) -> Tensor:
        """How many are left behind the last stage, before rounding."""
        return tokens.clamp(max=self.keep) if self.ratio is None else tokens * self.ratio

    def prune_layers(self, num_layers: int) -> list[int]:
        """The layers of the stages.

        Raises:
            ValueError: a stage behind the last layer.
        """
        return sorted(self.stage_at(num_layers))

    def budget(self, call: PromptCall) -> Tensor:
        """i32 [B]: how many tokens of every row stay in this call."""
        layers = self.stage_at(call.num_layers)
        left = self.left(call.original.double(), layers[call.layer], 1 + max(layers.values()))
        # Of 0.1 * 30 and the like the last bit must not decide.
        return (left + 1e-9).floor().to(torch.int32)

    def keep_best(self, call: PromptCall, scores: Tensor) -> Tensor:
        """i32 [B, V]: the slots that stay, by scores [B, L] of all tokens."""
        return best(call.of_visual(scores), self.budget(call), call.is_slot)

    def stage_at(self, num_layers: int) -> dict[int, int]:
        """The stage of every layer before which tokens are pruned; the last of several."""
        if self.stages is None:
            layers = [max(layer * num_layers // DEPTH, 1) for layer in self.published]
        else:
            layers = list(self.stages)
            if layers[-1] >= num_layers:
                raise ValueError(
                    f"stages must be layers below {num_layers}, got {layers[-1]} among {layers}"
                )
        return {layer: stage for stage, layer in enumerate(layers) if layer < num_layers}
