"""TOVA: the tokens stay that the newest one attends to most, the same in all heads of a layer.

Transformers are Multi-State RNNs (arXiv 2401.06104).

The weights of the last query are averaged over all heads, and the tokens of largest weight stay:
after a prompt as many as the budget says, and after every further token all but one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._eviction import check_budget
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


@dataclass(frozen=True)
class TovaOptions(Options):
    """Options of tokred.patch(model, "tova", ...).

    budget: tokens kept in every layer.
    """

    budget: int = 1024

    adapters = ("causal_lm_cache",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.budget, 1, "a token")

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The tokens that the last query attends to."""
        if call.stored <= self.budget:
            return None
        if call.is_one_over(self.budget):
            return call.drop(received=True, shared=True)
        scores = call.received(last=1).mean(1, keepdim=True)
        return call.best(scores.expand(-1, call.heads, -1), self.budget)


METHOD = Method(
    title="Transformers are Multi-State RNNs",
    arxiv="2401.06104",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="the tokens stay that the newest one attends to most, the same in all heads of a layer",
    options=TovaOptions,
)
