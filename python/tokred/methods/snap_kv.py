"""SnapKV: of a prompt, each head keeps the tokens that the last queries attend to most.

SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469).

The attention weights of the last `window` queries are summed over these queries, pooled over
neighbouring tokens, and the tokens of largest sum stay beside the window. The paper has as many
key heads as query heads; where several query heads share a key head, the mean of their weights
counts. Tokens that follow the prompt stay. A later pass of several tokens is a prompt too: the
cache is brought back to the budget by its queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ._eviction import check_window, window_scores
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


@dataclass(frozen=True)
class SnapKvOptions(Options):
    """Options of tokred.patch(model, "snap_kv", ...).

    budget: tokens that every head keeps of a prompt, the window included.
    window: the last queries, whose attention chooses and whose tokens stay.
    kernel: neighbouring tokens over which the attention is pooled; odd.
    pool: "max", as published, or "avg".
    """

    budget: int = 1024
    window: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel, self.budget)

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The window and the tokens that it attends to most, after a prompt."""
        if not call.is_prompt or call.stored <= self.budget:
            return None
        return call.best(window_scores(call, self.window, self.kernel, self.pool), self.budget)


METHOD = Method(
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="of a prompt, each head keeps the tokens that the last queries attend to",
    options=SnapKvOptions,
)
