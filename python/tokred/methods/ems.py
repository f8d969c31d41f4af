"""EMS: each head evicts its least important tokens and merges the middle ones into kept ones.

EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on Global-Local
Importance (arXiv 2412.08521).

An approximate version: only the outline is followed. As published: a score joins the attention
received from all queries and from the recent ones, brought to the same mean; tokens are alike by
cos(k, k') cos(v, v'); a token that is like no kept one belongs to a zero class, a centre that is
thrown away, so that all heads do the same work; keys merge as directions, their norms apart.
Different, or not known to be the same: the two scores add up; how many tokens merge is an argument
and the same for all heads, where the published rule adapts both to each head; the minimum likeness
is an argument; directions, norms and values merge in plain means, where the published ones are
weighted by attention. Inside a patch the first prompt is brought to the budget; what follows stays
as it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

import tokred

from ._eviction import Merged, check_budget, merged_prompt
from ._lists import check_minimum
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import EvictionCall, Replacement


def global_local_score(q: Tensor, k: Tensor, window: int = 32) -> Tensor:
    """f32 [B, Hkv, N]: the attention that tokens receive from all and from the last queries.

    Args:
        q: [B, Hq, L, D], the queries of a causal prompt. k: [B, Hkv, L, D].
        window: the last queries, at least 1.

    Raises:
        ValueError: a window below 1.

    2 (L + window) N D flops a head beside those of attention itself; nothing is stored.
    """
    check_minimum(1, window=window)
    columns = [
        tokred.attention_columns(x, k, causal=True).unflatten(1, (k.shape[1], -1)).sum(2)
        for x in (q, q[:, :, -window:])
    ]
    return _joined(*columns)


def _joined(overall: Tensor, local: Tensor) -> Tensor:
    """The sum of both, brought to the same mean."""
    return overall * (local.mean(2, keepdim=True) / overall.mean(2, keepdim=True)) + local


@dataclass
class EmsCache:
    """k [B, H, M, D], v [B, H, M, Dv]; indices i32 [B, H, M], where the kept tokens stood, and
    counts f32 [B, H, M], how many tokens each stands for."""

    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor

    def attend(
        self, q: Tensor, counted: bool = False, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D]: out and lse.

        counted: a token weighs as much as all that it replaces.
        """
        bias = self.counts.log() if counted else None
        return tokred.biased_attention(q, self.k, self.v, bias, scale=scale)


def classes(k: Tensor, v: Tensor, kept: Tensor, merging: Tensor, threshold: float) -> Tensor:
    """The place among the kept tokens that every merging one joins, i32 [B, H, R]; M: nowhere.

    Args:
        kept: i32 [B, H, M]; merging: i32 [B, H, R]. threshold: likeness of the zero class.

    O(B H R M) memory.
    """
    units = [normalize(x.float(), dim=3) for x in (k, v)]
    centres, others = (tokred.gather_tokens(units, rows) for rows in (kept, merging))
    likeness = torch.ones((), device=k.device)
    for centre, other in zip(centres, others, strict=True):
        likeness = likeness * (other @ centre.mT)
    zero_class = torch.full_like(likeness[..., :1], threshold)
    likeness, place = torch.cat([zero_class, likeness], 3).max(3)
    return torch.where(place == 0, kept.shape[2], place - 1).to(torch.int32)


def ems(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    budget: int,
    num_merged: int,
    window: int = 32,
    threshold: float = 0.6,
) -> EmsCache:
    """The cache of a prompt: `budget` tokens of every head, `num_merged` merged into them.

    Args:
        k: [B, H, N, D], v: [B, H, N, Dv]. scores: of global_local_score.
        budget: tokens kept, the last `window` among them; the others are those of largest score.
        num_merged: tokens that follow them in score, and merge where they are alike enough. What
            is left is evicted.

    Raises:
        ValueError: a budget below 1, or another number below 0.
    """
    check_minimum(1, budget=budget)
    check_minimum(0, num_merged=num_merged, window=window)
    tokens = k.shape[2]
    budget = min(budget, tokens)
    _, ranked = tokred.topk(
        scores, min(budget + num_merged, tokens), num_locals=min(window, budget)
    )
    kept, merging = ranked.split([budget, ranked.shape[2] - budget], 2)
    kept = kept.sort(2).values
    own = torch.arange(budget, dtype=torch.int32, device=k.device).expand(kept.shape)
    joins = classes(k, v, kept, merging, threshold)
    members = torch.cat([kept, merging], 2).contiguous()
    token_map = torch.cat([own, joins], 2).flatten(0, 1).contiguous()
    key, value = (x.flatten(0, 1) for x in tokred.gather_tokens([k, v], members))
    norm = key.float().norm(dim=2, keepdim=True)
    direction, counts = tokred.merge(normalize(key.float(), dim=2), token_map, budget)
    length, _ = tokred.merge(norm, token_map, budget)
    key = (normalize(direction, dim=2) * length).to(k.dtype)
    value, _ = tokred.merge(value, token_map, budget)
    key, value, counts = (x.unflatten(0, k.shape[:2]) for x in (key, value, counts))
    return EmsCache(key, value, kept, counts)


@dataclass(frozen=True)
class EmsOptions(Options):
    """Options of tokred.patch(model, "ems", ...).

    budget: tokens that every head keeps of a prompt, the last `window` among them.
    merged: tokens that follow them in score, and merge into kept ones that are alike.
    window: the last queries, whose attention counts for itself.
    threshold: likeness below which a token is evicted.
    counted: a token weighs as much as all that it replaces.
    """

    budget: int = 1024
    merged: int = 512
    window: int = 32
    threshold: float = 0.6
    counted: bool = False

    adapters = ("causal_lm_cache",)
    prompts_only = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum(0, merged=self.merged)
        check_minimum(1, window=self.window)
        check_budget(self.budget, self.window, "the window")

    def evict(self, call: EvictionCall) -> Replacement | None:
        """The first prompt, evicted and merged."""
        known = call.q.shape[2] < call.length
        if not call.is_prompt or known or call.stored <= self.budget:
            return None
        scores = _joined(call.received(), call.received(self.window))
        return merged_prompt(call, scores, self._merge)

    def _merge(self, k: Tensor, v: Tensor, scores: Tensor, position: Tensor) -> Merged:
        cache = ems(k, v, scores, self.budget, self.merged, self.window, self.threshold)
        place = position.gather(2, cache.indices.long())
        return cache.k, cache.v, place, cache.counts.log() if self.counted else None


METHOD = Method(
    title=(
        "EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on "
        "Global-Local Importance"
    ),
    arxiv="2412.08521",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="each head evicts its least important tokens, merges the middle ones into kept ones",
    options=EmsOptions,
)
