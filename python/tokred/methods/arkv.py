"""ARKV: tokens of three states in one cache, full precision, fp8 or evicted.

ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory Budget for
Long-Context Inference in LLMs (arXiv 2603.08727).

A prompt beyond the cache size keeps its heavy hitters and its last window. While decoding, a cache
that has grown beyond its size keeps three quarters of what lies before the window: the best of them
in full precision, as many as the layer's budget allows, and the others in fp8. A layer's budget
follows from the entropy, variance and kurtosis of its attention, relative to the largest of all
layers.

An approximate version, different from the released code in this:

- an fp8 scale is that of one token of one head, stored in float16; the release shares a float32 one
  among all heads and items of a slot;
- kept tokens of every head stay in the order of their positions; the release keeps those of a
  prompt in the order of their scores, and later orders those of the first head only. It matters to
  the pooling of scores over neighbours alone;
- weights are float32, and layer scores float64, whatever the dtype of the model; the release
  rounds the weights to that dtype before it takes scores of them;
- a window of one query has no variance and is refused, where the release computes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

import tokred
from tokred import PackedKV
from tokred._library import refuse_grad

from ._lists import check_minimum, check_query, check_tokens
from ._method import Family, Method, Needs

# The tau in the exponents 1 / tau of entropy, variance and kurtosis, and the weight of variance in
# scores of tokens: what the release sets for all of its models.
TAU = (7.774380648611771, 5.407015096778621, 5.527702582901318)
GAMMA = 263.8108280337562


def layer_score(q: Tensor, k: Tensor, tau: tuple[float, float, float] = TAU) -> float:
    """How much a layer gains from full precision: H^(1/t1) V^(1/t2) kappa^(1/t3).

    Args:
        q: [B, Hq, W, D], the last W queries of a prompt, at least 2. k: [B, Hkv, N, D].
        tau: the exponents' inverses, t1, t2 and t3.

    Of the weights of all these queries on the N - W keys before them (normalised over all N), H is
    the entropy, V the sum of every key's variance over the queries and kappa the sum of m4 / m2^2
    of the same. 0 where there is no key before the window. O(B Hq W N) memory.

    Raises:
        ValueError: fewer than two queries, or more than keys.
    """
    window, tokens = q.shape[2], k.shape[2]
    if not 2 <= window <= tokens:
        raise ValueError(f"q must have from 2 to the {tokens} tokens of k, got {window}")
    if window == tokens:
        return 0.0
    p = tokred.attention_rows(q, k, causal=True)[..., : tokens - window].double()
    entropy = -(p * (p + 1e-10).log()).sum()
    variance = p.var(2).sum()
    deviation = p - p.mean(2, keepdim=True)
    second = deviation.square().mean(2).clamp(min=1e-8)
    kurtosis = (deviation.pow(4).mean(2) / second.square()).sum()
    parts = (entropy, variance, kurtosis)
    return float(torch.stack([x ** (1 / t) for x, t in zip(parts, tau, strict=True)]).prod())


def origin_budgets(scores: list[float], cache_size: int, window: int, tokens: int) -> list[int]:
    """Tokens that every layer may keep in full precision, besides the window.

    Args:
        scores: layer_score of all layers; each is compared with the largest of them, wherever
            that stands.
        cache_size: tokens the cache may have, more than window.
        tokens: of the prompt.

    Raises:
        ValueError: a cache_size that is not above the window, or a window below 1.
    """
    _check_sizes(cache_size, window)
    most = max(min(cache_size - window, tokens - window), 0)
    largest = max(scores, default=0.0)
    shares = (score / largest if largest > 0 else 1.0 for score in scores)
    return [max(min(round(share * (cache_size - window)), most), 0) for share in shares]


def _check_sizes(cache_size: int, window: int) -> None:
    check_minimum(1, window=window)
    if cache_size <= window:
        raise ValueError(f"cache_size must be more than window = {window}, got {cache_size}")


def heavy_hitters(mean: Tensor, variance: Tensor, heads_kv: int, window: int) -> Tensor:
    """Scores f32 [B, Hkv, N - window] from weights that keys receive, in order of position.

    Args:
        mean, variance: f32 [B, Hq, N] over the queries; a single query has variance 0.

    Mean + gamma variance, averaged over five neighbouring tokens and over the group's heads.
    """
    score = (mean + GAMMA * variance)[..., : mean.shape[2] - window]
    return avg_pool1d(score, 5, 1, 2).unflatten(1, (heads_kv, -1)).mean(2)


@dataclass
class ArkvCache:
    """One layer: packed tokens, then those in full precision. Every head has its own.

    packed_k, packed_v: fp8, P tokens. k [B, Hkv, R, D], v [B, Hkv, R, Dv]: in full precision.
    position: int64 [B, Hkv, P + R], where the tokens stood. The last three are the filled part of
    buffers in which they grow.

    Memory: P tokens in fp8 and room for cache_size + 1 - P in full precision, as many as there are
    right before a shrink; 8 bytes a head for the position of each.
    """

    packed_k: PackedKV
    packed_v: PackedKV
    k: Tensor
    v: Tensor
    position: Tensor
    origin_budget: int
    cache_size: int
    window: int
    length: int

    def __post_init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._hold(self.k, self.v, self.position)

    @property
    def num_tokens(self) -> int:
        return self.position.shape[2]

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """One token: appends it, attends, and shrinks the cache where it has outgrown its size.

        Args:
            q: [B, Hq, 1, D]; k: [B, Hkv, 1, D]; v: [B, Hkv, 1, Dv].

        Returns:
            [B, Hq, 1, Dv]: one softmax over tokens of both precisions.

        Raises:
            ValueError: k or v of another shape or dtype than those in the cache, a q that does not
                fit them, or one that requires grad; the cache is unchanged.

        Complexity: one read of all tokens, and a write of the new one; a shrink, every quarter of
        the cache, reads and packs them all. Only the first shrink makes new buffers.
        """
        for name, token, held in (("k", k, self.k), ("v", v, self.v)):
            check_tokens(name, token, [*held.shape[:2], 1, held.shape[3]], (held.dtype,))
        check_query(q, k)
        refuse_grad("step", q=q, k=k, v=v)
        arriving: tuple[tuple[str, Any], ...] = (("k", k), ("v", v), ("position", self.length))
        for name, token in arriving:
            end = getattr(self, name).shape[2] + 1
            grown = self._buffers[name][:, :, :end]
            grown[:, :, -1:] = token
            setattr(self, name, grown)
        self.length += 1
        out, lse = tokred.packed_attention(q, self.packed_k, self.packed_v, self.k, self.v, scale)
        if self.num_tokens > self.cache_size:
            logits = tokred.packed_qk_score(q, self.packed_k, self.k, scale=scale)
            self.shrink((logits - lse).exp())
        return out

    def shrink(self, weights: Tensor) -> None:
        """Keeps three quarters of what lies before the window, by weights f32 [B, Hq, P + R]."""
        group = weights.shape[1] // self.k.shape[1]
        order = self.position.argsort(2)
        weights = weights.gather(2, order.repeat_interleave(group, 1))
        scores = heavy_hitters(weights, torch.zeros_like(weights), self.k.shape[1], self.window)
        past = scores.shape[2]
        keep = past * 3 // 4
        origin = min(max(self.origin_budget - self.window, 0), keep)
        best = tokred.topk(scores, keep)[1].long()
        recent = torch.arange(past, past + self.window, device=order.device)
        whole = torch.cat(
            [best[..., :origin].sort(-1).values, recent.expand(*best.shape[:2], -1)], 2
        )
        low = order.gather(2, best[..., origin:].sort(-1).values)
        whole = order.gather(2, whole)
        sides = [(self.packed_k, self.k), (self.packed_v, self.v)]
        rows = [torch.cat([tokred.kv_unpack(p, x.dtype), x], 2) for p, x in sides]
        self.packed_k, self.packed_v = (pack_fp8(x) for x in tokred.gather_tokens(rows, low.int()))
        position = self.position.gather(2, torch.cat([low, whole], 2))
        k, v = tokred.gather_tokens(rows, whole.int())
        self._hold(k, v, position)

    def _hold(self, k: Tensor, v: Tensor, position: Tensor) -> None:
        """Copies these into buffers with room for all tokens that come before the next shrink."""
        for name, x in (("k", k), ("v", v), ("position", position)):
            packed = 0 if name == "position" else self.packed_k.num_tokens
            room = max(self.cache_size - packed, x.shape[2]) + 1
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape[2] != room:
                buffer = x.new_empty(*x.shape[:2], room, *x.shape[3:])
                self._buffers[name] = buffer
            filled = buffer[:, :, : x.shape[2]]
            filled.copy_(x)
            setattr(self, name, filled)


def pack_fp8(x: Tensor) -> PackedKV:
    """x [B, H, N, D] as e4m3 numbers, a scale for every token and head."""
    return tokred.kv_pack(x, 8, x.shape[3], scheme="fp8")


def compress_prompt(
    q: Tensor, k: Tensor, v: Tensor, origin_budget: int, cache_size: int, window: int = 32
) -> ArkvCache:
    """The cache after a prompt: everything, or its heavy hitters and the last window.

    Args:
        q: [B, Hq, window, D], the last queries. k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        origin_budget: of origin_budgets. cache_size: tokens the cache may have, more than window.

    Raises:
        ValueError: a cache_size that is not above the window, a window below 1, a negative budget,
            or, with a prompt beyond the cache, a q of another number of queries than the window.
    """
    _check_sizes(cache_size, window)
    check_minimum(0, origin_budget=origin_budget)
    tokens = k.shape[2]
    if tokens > cache_size and q.shape[2] != window:
        raise ValueError(f"q must have the last {window} queries, got {q.shape[2]}")
    position = torch.arange(tokens, device=k.device).expand(*k.shape[:2], -1)
    if tokens > cache_size:
        _, lse = tokred.biased_attention(q, k, v, causal=True)
        mean, variance = (
            tokred.attention_columns(q, k, lse, statistic, causal=True)
            for statistic in ("mean", "variance")
        )
        scores = heavy_hitters(mean, variance, k.shape[1], window)
        best = tokred.topk(scores, cache_size - window, order="position")[1].long()
        position = torch.cat([best, position[..., tokens - window :]], 2)
        k, v = tokred.gather_tokens([k, v], position.int())
    empty_k, empty_v = (pack_fp8(x[:, :, :0]) for x in (k, v))
    return ArkvCache(empty_k, empty_v, k, v, position, origin_budget, cache_size, window, tokens)


METHOD = Method(
    title=(
        "ARKV: Adaptive and Resource-Efficient KV Cache Management under Limited Memory Budget for "
        "Long-Context Inference in LLMs"
    ),
    arxiv="2603.08727",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL,),
    status="approximate",
    summary="one cache of tokens in full precision, tokens in fp8 and evicted ones",
)
