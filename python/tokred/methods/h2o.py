"""H2O: each head keeps the tokens that have received most attention so far, and the last ones.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (arXiv
2306.14048).

An approximate version, as the released code is: a prompt attends to all of its tokens, and is
brought to the budget afterwards by the attention that all of its queries have paid, where the
algorithm on paper drops tokens while it reads the prompt. Then every new token adds the attention
that it pays, and the token with the smallest of it goes, unless it is among the last. Where several
query heads share a key head, the mean of their weights counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._eviction import check_budget
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


@dataclass(frozen=True)
class H2oOptions(Options):
    """Options of tokred.patch(model, "h2o", ...).

    budget: tokens that every head keeps. recent: how many of them are the last ones; half of the
        budget where None.
    """

    budget: int = 1024
    recent: int | None = None

    adapters = ("causal_lm_cache",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None and self.recent < 1:
            raise ValueError(f"recent must be at least 1, got {self.recent}")
        check_budget(self.budget, self.recent or 1, "the last tokens")

    def evict(self, call: EvictionCall) -> Eviction:
        """The last tokens and the heavy hitters."""
        recent = self.budget - self.budget // 2 if self.recent is None else self.recent
        before = call.state.get("received")
        if call.is_one_over(self.budget):
            return call.drop(before, "received", received=True, recent=recent)
        received = call.received()
        if before is not None:
            received = received + before
        if call.stored <= self.budget:
            return call.all(received=received)
        scores = received.masked_fill(call.recent(recent), float("inf"))
        return call.best(scores, self.budget, received=received)


METHOD = Method(
    title=("H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models"),
    arxiv="2306.14048",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="each head keeps the tokens that received most attention so far, and the last ones",
    options=H2oOptions,
)
