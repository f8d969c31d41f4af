"""PyramidKV: SnapKV's choice, with more tokens in the first layers than in the last ones.

PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (arXiv 2406.02069).

Beside the window, the last layer keeps 1 / beta of an average layer's tokens, and the budgets fall
from layer to layer by the same number, so that all layers keep as many as with equal budgets. Where
a prompt has fewer tokens than the first layer may keep, it keeps them all, and the last one so many
more. Where several query heads share a key head, the mean of their weights counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ._eviction import check_window, window_scores
from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


def layer_budget(
    layer: int, num_layers: int, budget: int, window: int, tokens: int, beta: int = 20
) -> int:
    """Tokens that a layer keeps, the window included, of a prompt with so many tokens.

    Args:
        budget: of an average layer, the window included.
    """
    check_minimum(window, budget=budget)
    average = budget - window
    last = average // beta
    first = 2 * average - last
    if first > tokens - window:
        first = max(tokens - window, average)
        last = 2 * average - first
    if num_layers == 1:
        return budget
    return window + first - (first - last) * layer // (num_layers - 1)


@dataclass(frozen=True)
class PyramidKvOptions(Options):
    """Options of tokred.patch(model, "pyramid_kv", ...).

    budget: tokens that a head keeps of a prompt in an average layer, the window included.
    window: the last queries, whose attention chooses and whose tokens stay.
    beta: how many times fewer tokens the last layer keeps than an average one, beside the window.
    kernel: neighbouring tokens over which the attention is pooled; odd.
    pool: "max" or "avg".
    """

    budget: int = 1024
    window: int = 32
    beta: int = 20
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.beta < 1:
            raise ValueError(
                f"window and beta must be at least 1, got {self.window} and {self.beta}"
            )
        check_window(self.window, self.kernel, self.budget)

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The window and the tokens that it attends to most, as many as the layer may keep."""
        if not call.is_prompt or call.stored <= self.budget:
            return None
        budget = layer_budget(
            call.layer, call.num_layers, self.budget, self.window, call.stored, self.beta
        )
        return call.best(window_scores(call, self.window, self.kernel, self.pool), budget)


METHOD = Method(
    title="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arxiv="2406.02069",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="SnapKV's choice, with more tokens in the first layers than in the last ones",
    options=PyramidKvOptions,
)
