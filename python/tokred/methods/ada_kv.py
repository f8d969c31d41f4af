"""Ada-KV: SnapKV's choice, with budgets that the heads of a layer share out by their scores.

Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference
(arXiv 2407.11550).

The heads of a layer compete for as many tokens as they would keep with equal budgets: the tokens of
largest score among all heads count for their heads, and a share of every head's budget, the
safeguard, stays that of equal budgets. Each head then keeps its own best tokens.

An approximate version in what it saves: heads of a layer are stored with places for as many tokens
as the longest keeps, and what is left empty is hidden from attention. Where several query heads
share a key head, the mean of their weights counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import tokred

from ._eviction import check_window, window_scores
from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


def head_budgets(scores: Tensor, budget: int, safeguard: float = 0.2) -> Tensor:
    """i32 [B, H]: tokens that every head keeps, budget tokens on average.

    Args:
        scores: f32 [B, H, N]; -inf for what no head keeps.
        safeguard: share of the budget that every head has in any case.
    """
    check_minimum(0, budget=budget)
    batch, heads, tokens = scores.shape
    best = tokred.topk(scores.reshape(batch, -1), min(heads * budget, heads * tokens))[1]
    owner = torch.where(best < 0, -1, best // max(tokens, 1))
    won = (owner[:, None] == torch.arange(heads, device=best.device)[:, None]).sum(2)
    return ((1 - safeguard) * won + safeguard * budget).round().to(torch.int32)


@dataclass(frozen=True)
class AdaKvOptions(Options):
    """Options of tokred.patch(model, "ada_kv", ...).

    budget: tokens that a head keeps of a prompt on average, the window included.
    window: the last queries, whose attention chooses and whose tokens stay.
    safeguard: share of the budget, beside the window, that every head has in any case.
    kernel: neighbouring tokens over which the attention is pooled; odd.
    pool: "max" or "avg".
    """

    budget: int = 1024
    window: int = 32
    safeguard: float = 0.2
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self.window, self.kernel, self.budget)
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"safeguard must be from 0 to 1, got {self.safeguard}")

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The window and each head's share of the tokens that it attends to most."""
        if not call.is_prompt or call.stored <= self.budget:
            return None
        scores = window_scores(call, self.window, self.kernel, self.pool)
        others = scores.masked_fill(call.recent(self.window), -torch.inf)
        if call.bias is not None:
            others = others.masked_fill(call.bias == -torch.inf, -torch.inf)
        budgets = head_budgets(others, self.budget - self.window, self.safeguard) + self.window
        # The longest head's budget decides how many places there are.
        return call.best(scores, int(budgets.amax()), budgets)


METHOD = Method(
    title=(
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
        "Inference"
    ),
    arxiv="2407.11550",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="SnapKV's choice, with budgets that the heads of a layer share out by their scores",
    options=AdaKvOptions,
)
