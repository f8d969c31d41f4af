"""StreamingLLM: the cache keeps the first tokens, which attention falls back to, and the last ones.

Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453).

An approximate version: keys keep the rotation of their positions in the text, and new tokens go on
from the length of the text; the paper counts positions within the cache. A prompt attends to all of
its tokens before it loses some; the paper reads a text token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._eviction import check_budget
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


@dataclass(frozen=True)
class StreamingLlmOptions(Options):
    """Options of tokred.patch(model, "streaming_llm", ...).

    budget: tokens kept. sinks: how many of them are the first ones; the others are the last.
    """

    budget: int = 1024
    sinks: int = 4

    adapters = ("causal_lm_cache",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        check_budget(self.budget, self.sinks + 1, "the sinks and the token itself")

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The first and the last tokens."""
        if call.stored <= self.budget:
            return None
        if call.is_one_over(self.budget):
            return call.drop(first=self.sinks)
        scores = call.position.float().masked_fill(call.first(self.sinks), float("inf"))
        return call.best(scores, self.budget)


METHOD = Method(
    title="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="the cache keeps the first tokens and the last ones",
    options=StreamingLlmOptions,
)
