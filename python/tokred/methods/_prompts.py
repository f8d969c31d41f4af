"""What the methods that prune visual tokens inside a language model share: stages and budgets."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

import tokred

from ._selection import best, keep_count
from ._visual import VisualOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall

Number: TypeAlias = Any  # a float, or a tensor f64 of such

DEPTH = 32  # layers of the language models that the papers give their layers for


def least(a: Number, b: Number) -> Number:
    """The smaller one, of numbers and of tensors."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)


def geometric(tokens: Number, end: Number, progress: float) -> Number:
    """tokens at progress 0, end at progress 1, by equal factors between them; end <= tokens."""
    return tokens ** (1.0 - progress) * end**progress


def pick(scores: Tensor, budget: Tensor, places: int, valid: Tensor | None = None) -> Tensor:
    """The tokens of highest score in every row, by position; the lower index on a tie.

    Args:
        scores: [B, V]; NaN and -inf are never kept.
        budget: integers [B], how many stay; places: the most of them.
        valid: bool [B, V]; False is never kept.

    Returns:
        i32 [B, places], -1 behind the last.
    """
    scores = scores.detach()
    scores = scores.float() if scores.dtype == torch.float64 else scores
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    row_k = budget.to(torch.int32).contiguous()
    return tokred.topk(scores.contiguous(), places, order="position", row_k=row_k)[1]


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
    def left(self, tokens: Number, stage: int, of: int) -> Number:
        """How many of a prompt's visual tokens are left behind a stage, of so many; rounded down.

        The more tokens, the more are left; the later the stage, the fewer. Of a number or, of many
        prompts at once, f64 [B].
        """

    def end(self, tokens: Number) -> Number:
        """How many are left behind the last stage, before rounding."""
        return least(tokens, float(self.keep)) if self.ratio is None else tokens * self.ratio

    def prune_layers(self, num_layers: int) -> list[int]:
        """The layers of the stages.

        Raises:
            ValueError: a stage behind the last layer.
        """
        return sorted(self.stage_at(num_layers))

    def budget(self, call: PromptCall) -> tuple[Tensor, int]:
        """(i32 [B], how many tokens of every row stay in this call, and the most of them)."""
        stage, of = self.stage(call)
        slots = call.slots.shape[1]
        budget = self._whole(call.original.double(), stage, of).to(torch.int32)
        # The row with most tokens, of which only the slots that are left tell.
        most = float(slots if stage == 0 else self._greatest(slots, stage - 1, of))
        return budget, min(int(self._whole(most, stage, of)), slots)

    def stage(self, call: PromptCall) -> tuple[int, int]:
        """(the number of the call's stage, how many there are)."""
        layers = self.stage_at(call.num_layers)
        return layers[call.layer], 1 + max(layers.values())

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

    def _whole(self, tokens: Number, stage: int, of: int) -> Number:
        # Of 0.1 * 30 and the like the last bit must not decide.
        return (self.left(tokens, stage, of) + 1e-9) // 1

    def _greatest(self, slots: int, stage: int, of: int) -> int:
        """The most tokens of which no more than so many slots are left behind a stage."""
        low, high = slots, 1 << 24
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._whole(float(middle), stage, of) <= slots
            low, high = (middle, high) if fits else (low, middle)
        return low
