"""Expected Attention: tokens stay that future queries will attend to, as normal ones would.

Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution
(arXiv 2510.00636).

Before rotation, the queries of a prompt have a mean and a covariance; the mean rotation of the next
places gives those of future queries. A normal query with them gives a key the expected weight
exp(scale mu k + scale^2 k S k / 2), normalised over the keys, and its norm of the value times this
weight is the score of a token.

An approximate version, as the released code is: the norm is that of the value and not of what the
output projection makes of it, and all heads keep the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._eviction import check_budget
from ._method import Family, Method, Needs, Options

if TYPE_CHECKING:
    from tokred.patching import Eviction, EvictionCall


def future_queries(
    q: Tensor, weight: Tensor, rotary: Any, places: Tensor, future: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Mean f32 [B, Hq, D] and covariance f32 [B, Hq, D, D] of the queries that follow.

    Args:
        q: [B, Hq, L, D], rotated. weight: f32 [B | 1, L], 0 where a query does not count.
        places: int [B | 1, L], of the queries, below the limit. future: how many places follow.
    """
    following = places[:, -1:] + 1 + torch.arange(future, device=q.device)
    cos, sin = rotary.tables(limit + future, q.device)
    half = q.shape[3] // 2

    def rotate_half(x: Tensor) -> Tensor:
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    c, s = cos[places][:, None], sin[places][:, None]
    x = q.float()
    x = (x * c - rotate_half(x) * s) / (c * c + s * s)
    w = weight[:, None, :, None] / weight.sum(1).clamp(min=1)[:, None, None, None]
    mean = (w * x).sum(2, keepdim=True)
    centred = x - mean
    covariance = (w * centred).mT @ centred
    c, s = (table[following].mean(1)[:, None, None] for table in (cos, sin))
    # Rotation by the mean of both tables, of the mean and of both sides of the covariance.
    mean = (mean * c + rotate_half(mean) * s)[:, :, 0]
    for _ in range(2):
        covariance = (covariance * c + rotate_half(covariance) * s).mT
    return mean, covariance


@dataclass(frozen=True)
class ExpectedAttentionOptions(Options):
    """Options of tokred.patch(model, "expected_attention", ...).

    budget: tokens that every head keeps of a prompt. sinks: the first tokens, which stay and whose
        queries do not count.
    future: places over which the rotation of future queries is averaged.
    covariance: False leaves the covariance of the queries out.
    """

    budget: int = 1024
    sinks: int = 4
    future: int = 512
    covariance: bool = True

    adapters = ("causal_lm_cache",)
    prompts_only = True
    reads_rotary = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")
        if self.future < 1:
            raise ValueError(f"future must be at least 1, got {self.future}")
        check_budget(self.budget, self.sinks, "the sinks")

    def evict(self, call: EvictionCall) -> Eviction | None:
        """The first tokens and those expected to receive most attention later, after a prompt."""
        if not call.is_prompt or call.stored <= self.budget:
            return None
        q, new = call.q, call.q.shape[2]
        places = torch.arange(call.length - new, call.length, device=q.device)[None]
        counts = (places >= self.sinks).float()
        if call.start is not None:
            places = places - call.start[:, None]
            counts = (places >= self.sinks).float()
            places = places.clamp(min=0)
        mean, covariance = future_queries(q, counts, call.rotary, places, self.future, call.length)
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        heads = call.k.shape[1]
        k = call.k.float()
        mean = mean.unflatten(1, (heads, -1))
        logits = scale * (mean @ k.mT)
        if self.covariance:
            projected = k[:, :, None] @ covariance.unflatten(1, (heads, -1))
            logits = logits + scale**2 / 2 * (projected * k[:, :, None]).sum(4)
        first = call.first(self.sinks)
        hidden = first if call.bias is None else first | (call.bias == -torch.inf)
        weights = logits.masked_fill(hidden[:, :, None], -torch.inf).softmax(3).mean(2)
        scores = weights * call.v.float().norm(dim=3)
        return call.best(scores.masked_fill(first, float("inf")), self.budget)


METHOD = Method(
    title=(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
        "Distribution"
    ),
    arxiv="2510.00636",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="tokens stay that queries to come are expected to attend to",
    options=ExpectedAttentionOptions,
)
