"""RazorAttention: retrieval heads keep the whole cache, the others keep sinks, recent tokens and
one token that stands for all that was dropped.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import tokred


def head_scores(q: Tensor, k: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """How much each query head looks back to earlier copies of the same token.

    Args:
        q: [B, Hq, L, D] and k: [B, Hkv, L, D] of a sequence that repeats `period` random tokens
            (the paper: four times 2500).

    Returns:
        (echo, induction), f32 [Hq]: the mean attention mass on earlier copies of the query's token,
        and on the tokens right behind those copies. O(L^2) time, one period of rows at a time.
    """
    length = q.shape[2]
    totals = [torch.zeros(q.shape[1], device=q.device) for _ in range(2)]
    for start in range(period, length, period):
        end = min(start + period, length)
        rows = tokred.attention_rows(q[:, :, start:end], k[:, :, :end], causal=True)
        query = torch.arange(start, end, device=q.device)
        key = torch.arange(end, device=q.device)
        distance = query[:, None] - key
        for total, shift in zip(totals, (0, 1), strict=True):
            copies = (distance > 0) & ((distance + shift) % period == 0) & (key >= shift)
            total += (rows * copies).sum((0, 2, 3))
    return tuple(total / (q.shape[0] * (length - period)) for total in totals)


def retrieval_heads(
    echo: Tensor, induction: Tensor, num_kv_heads: int, echo_share: float = 0.01,
    induction_share: float = 0.14,
) -> Tensor:  # fmt: skip
    """Which key heads keep everything.

    Args:
        echo, induction: f32 [layers, Hq] from head_scores; the greatest of a group counts.

    Returns:
        bool [layers, Hkv]: the top echo_share by echo and the top induction_share by induction,
        counted over all layers, at least one each.
    """
    chosen = torch.zeros(echo.shape[0], num_kv_heads, dtype=torch.bool, device=echo.device)
    for scores, share in ((echo, echo_share), (induction, induction_share)):
        grouped = scores.unflatten(-1, (num_kv_heads, -1)).amax(-1).flatten()
        kept = max(int(share * grouped.numel()), 1)
        chosen.view(-1)[tokred.topk(grouped, kept)[1].long()] = True
    return chosen


@dataclass
class RazorHeads:
    """The cache of heads that are no retrieval heads: sinks, one compensation token, recent tokens.

    k [B, H, S, D] and v [B, H, S, Dv], the compensation token behind the sinks; dropped is the
    number of tokens it stands for, in float32 [B, H].
    """

    k: Tensor
    v: Tensor
    dropped: Tensor
    num_sinks: int
    window: int

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D]: the compensation token's logit gets + log(dropped)."""
        bias = torch.zeros(self.k.shape[:3], dtype=torch.float32, device=q.device)
        bias[:, :, self.num_sinks] = self.dropped.log()
        return tokred.biased_attention(q, self.k, self.v, bias, scale=scale)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds one token k [B, H, 1, D], v [B, H, 1, Dv]; the oldest recent one is compensated."""
        place = self.num_sinks
        oldest = place + 1
        full = self.k.shape[2] - oldest >= self.window
        for name, new in (("k", k), ("v", v)):
            cache = torch.cat([getattr(self, name), new], dim=2)
            if full:
                mean, left = cache[:, :, place].float(), cache[:, :, oldest].float()
                count = self.dropped[..., None]
                mean = ((count * mean + left) / (count + 1)).to(cache.dtype)
                kept = [cache[:, :, :place], mean[:, :, None], cache[:, :, oldest + 1 :]]
                cache = torch.cat(kept, dim=2)
            setattr(self, name, cache)
        if full:
            self.dropped = self.dropped + 1


def compress(
    k: Tensor, v: Tensor, num_sinks: int = 4, window: int | None = None, compression: float = 5.0
) -> RazorHeads:
    """The cache of heads that are no retrieval heads, after prefill.

    Args:
        k: [B, H, N, D], rotated keys; v: [B, H, N, Dv].
        window: recent tokens kept; max(4000, N / compression) where None, as published.

    Returns:
        RazorHeads. With nothing to drop the compensation token has count 0, that is no weight.
    """
    tokens = k.shape[2]
    window = max(4000, int(tokens / compression)) if window is None else window
    sinks = min(num_sinks, tokens)
    start = max(tokens - window, sinks)

    def shrink(x: Tensor) -> Tensor:
        dropped = x[:, :, sinks:start].float()
        mean = dropped.sum(2, keepdim=True) / max(start - sinks, 1)
        return torch.cat([x[:, :, :sinks], mean.to(x.dtype), x[:, :, start:]], dim=2)

    dropped = torch.full(k.shape[:2], float(start - sinks), device=k.device)
    return RazorHeads(shrink(k), shrink(v), dropped, sinks, window)


def razor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieval: Tensor,
    others: RazorHeads,
    scale: float | None = None,
) -> Tensor:
    """One decode step over both kinds of heads.

    Args:
        q: [B, Hq, L, D].
        k, v: [B, R, N, ..], the whole cache of the R retrieval heads.
        retrieval: bool [Hkv], which key heads those are.
        others: the rest, Hkv - R heads.

    Returns:
        [B, Hq, L, Dv].
    """
    group = q.shape[1] // retrieval.shape[0]
    whole = retrieval.repeat_interleave(group)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    if v.shape[1]:
        out[:, whole] = tokred.biased_attention(q[:, whole], k, v, scale=scale)[0]
    if others.k.shape[1]:
        out[:, ~whole] = others.attend(q[:, ~whole], scale)[0]
    return out
