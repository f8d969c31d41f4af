"""G-Search: the minimum number of visual tokens of every layer, never more than in the one before.

Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction (arXiv
2412.00556).

The search asks a function of the caller how good the model is with a number of tokens in each
layer. An approximate version: the published search takes the numbers in order of layer from
attention's ranking, and P-Sigmoid's parameters from Bayesian optimisation; that each layer's number
is found by bisection, and the defaults of the sigmoid, are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from tokred.schedule import keep_share

from ._method import Family, Method, Needs
from ._prompts import StagedOptions

if TYPE_CHECKING:
    from tokred.patching import PromptCall


def greedy_search(
    good: Callable[[list[int]], bool], num_layers: int, tokens: int, first: int = 1
) -> list[int]:
    """The smallest number of tokens of every layer with which the model is still good.

    From the shallow layers to the deep ones, each takes the smallest number with which it and all
    later layers may work: a layer that has fewer never helps one that has more.

    Args:
        good: whether the model is, with so many tokens in each of num_layers layers; with more
            tokens it is if it is with fewer.
        tokens: of the image, which the layers before `first` keep.

    Returns:
        num_layers ints, never more than the one before; all of them `tokens` where not even these
        are good.

    Raises:
        ValueError: first outside [0, num_layers].

    Complexity: log2(tokens) calls of `good` a layer.
    """
    if not 0 <= first <= num_layers:
        raise ValueError(f"first must be one of {num_layers} layers, got {first}")
    kept = [tokens] * first
    while len(kept) < num_layers:
        rest = num_layers - len(kept)
        # The model is good with `high`, as far as earlier layers can tell, and not with low - 1.
        low, high = 0, kept[-1] if kept else tokens
        while low < high:
            middle = (low + high) // 2
            tried = [*kept, middle, *[middle] * (rest - 1)]
            low, high = (low, middle) if good(tried) else (middle + 1, high)
        kept.append(high)
    return kept


@dataclass(frozen=True)
class GSearchOptions(StagedOptions):
    """Options of tokred.patch(vlm, "g_search", ...).

    keep: visual tokens of a prompt that the schedule ends with. ratio: their share, in place of
    keep. kind: "sigmoid" or "linear", how many there are on the way, see
    tokred.schedule.keep_schedule. centre, width: of the sigmoid, in shares of the depth.
    stages: the layers before which tokens are dropped; all but the first where None.
    positions: "kept", "renumbered" or "auto". newlines: "keep" or "drop" those at the ends of rows.
    """

    kind: Literal["sigmoid", "linear"] = "sigmoid"
    centre: float = 0.3
    width: float = 0.1

    published: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width > 0:
            raise ValueError(f"width must be above 0, got {self.width}")

    def stage_at(self, num_layers: int) -> dict[int, int]:
        """A stage before every layer but the first, where no others are asked for."""
        if self.stages is not None:
            return super().stage_at(num_layers)
        return {layer: layer - 1 for layer in range(1, num_layers)}

    def left(self, tokens: Tensor, stage: int, of: int) -> Tensor:
        """The tokens left, by the schedule."""
        share = keep_share(stage / max(of - 1, 1), self.kind, self.centre, self.width)
        end = self.end(tokens)
        return end + (tokens - end) * share

    def prune(self, call: PromptCall) -> Tensor:
        """The tokens that the last token attends to most in the layer before."""
        return self.keep_best(call, call.last_attention().mean(1))


METHOD = Method(
    title=(
        "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction"
    ),
    arxiv="2412.00556",
    family=Family.PRUNE,
    needs=(Needs.VISION_LANGUAGE_MODEL, Needs.CALIBRATION),
    status="approximate",
    summary="every layer has the fewest visual tokens that serve, by search or a sigmoid",
    options=GSearchOptions,
)
