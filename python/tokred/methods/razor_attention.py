"""RazorAttention: retrieval heads keep the whole cache, the others keep sinks, recent tokens and
one token that stands for all that was dropped.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891). Packed
in a few bits, heads of either kind share one pool: see `pack_heads`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

import tokred
from tokred import PackedKV, PackFormat


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


@dataclass
class PackedRazorHeads:
    """All heads of a prompt in one pool of packed tokens, each with as many as it keeps.

    k, v: [1, 1, S, ..], S the sum over items and heads. The rest is a row for every item and head:
    slots i32 [B Hkv, T], where its tokens are in the pool, lengths i32 [B Hkv], how many they are,
    and bias f32 [B Hkv, 1, T], log(dropped) for compensation tokens.
    """

    k: PackedKV
    v: PackedKV
    slots: Tensor
    lengths: Tensor
    bias: Tensor

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D] to the prompt, in one call for heads of all lengths.

        Returns:
            out [B, Hq, L, Dv] and lse [B, Hq, L], for `combine_states` with that of later tokens.
        """
        rows = q.reshape(self.slots.shape[0], -1, *q.shape[2:])
        out, lse = tokred.packed_attention(
            rows,
            self.k,
            self.v,
            scale=scale,
            key_bias=self.bias,
            length=self.slots.shape[1],
            lengths=self.lengths,
            slots=self.slots,
        )
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])


def pack_heads(
    k: Tensor, v: Tensor, retrieval: Tensor, others: RazorHeads, key: PackFormat, value: PackFormat
) -> PackedRazorHeads:
    """Packs retrieval heads, which keep all tokens, beside the others, which keep some.

    Args:
        k: [B, R, N, D], v: [B, R, N, Dv], the whole cache of the R retrieval heads.
        retrieval: bool [Hkv], which key heads those are. others: the rest, Hkv - R heads.
        key, value: formats along channels, as tokens of different heads follow each other.

    Memory: the packed tokens that are kept, and 8 B Hkv T bytes of tables.
    """
    batch, heads = k.shape[0], retrieval.shape[0]
    kept, short = k.shape[2], others.k.shape[2]
    device = k.device
    lengths = torch.where(retrieval.to(device), kept, short).expand(batch, -1)
    places = max(kept, short)
    # The pool has first the tokens of all retrieval heads, item by item, then those of the others.
    rank = torch.empty(heads, dtype=torch.int64, device=device)
    for mine in (retrieval, ~retrieval):
        rank[mine] = torch.arange(int(mine.sum()), device=device)
    item = torch.arange(batch, device=device)[:, None]
    whole = (item * k.shape[1] + rank) * kept
    some = batch * k.shape[1] * kept + (item * others.k.shape[1] + rank) * short
    first = torch.where(retrieval.to(device), whole, some)
    slots = first[..., None] + torch.arange(places, device=device)
    bias = torch.zeros(batch, heads, places, device=device)
    bias[:, ~retrieval, others.num_sinks] = others.dropped.log()

    def pack(x: Tensor, rest: Tensor, form: PackFormat) -> PackedKV:
        rows = torch.cat([part.reshape(1, 1, -1, part.shape[3]) for part in (x, rest)], 2)
        return tokred.kv_pack(rows, *astuple(form))

    return PackedRazorHeads(
        pack(k, others.k, key),
        pack(v, others.v, value),
        slots.flatten(0, 1).int(),
        lengths.flatten().int(),
        bias.flatten(0, 1)[:, None],
    )
