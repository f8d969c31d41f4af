"""RazorAttention: retrieval heads keep the whole cache, the others keep sinks, recent tokens and
one token that stands for all that was dropped.

RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv 2407.15891). Packed
in a few bits, heads of either kind share one pool, into which decoding appends: see `pack_heads`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

import tokred
from tokred import PackedKV, PackFormat
from tokred._library import refuse_grad

from ._lists import check_minimum, check_number, check_tokens
from ._method import Family, Method, Needs


def head_scores(q: Tensor, k: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """How much each query head attends to earlier copies of the same token.

    Args:
        q: [B, Hq, L, D] and k: [B, Hkv, L, D] of a sequence that repeats `period` random tokens
            (the paper: four times 2500).

    Returns:
        (echo, induction), f32 [Hq]: the mean attention mass on earlier copies of the query's token,
        and on the tokens right behind those copies. O(L^2) time, one period of rows at a time.

    Raises:
        ValueError: a period below 1, or one that does not repeat in L tokens.
    """
    length = q.shape[2]
    if not 1 <= period < length:
        raise ValueError(f"period must be from 1 to less than {length} tokens, got {period}")
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
    pairs = q.shape[0] * (length - period)
    return totals[0] / pairs, totals[1] / pairs


def retrieval_heads(
    echo: Tensor, induction: Tensor, num_kv_heads: int, echo_share: float = 0.01,
    induction_share: float = 0.14,
) -> Tensor:  # fmt: skip
    """Which key heads keep everything.

    Args:
        echo, induction: f32 [layers, Hq] from head_scores; the largest of a group counts.

    Returns:
        bool [layers, Hkv]: the top echo_share by echo and the top induction_share by induction,
        counted over all layers: int(share * heads), at least one each.

    Raises:
        ValueError: a share outside [0, 1].
    """
    for name, share in (("echo_share", echo_share), ("induction_share", induction_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
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
    number of tokens it stands for, in float32 [B, H]. The recent tokens are a ring, of which row
    `oldest` is the first to leave.
    """

    k: Tensor
    v: Tensor
    dropped: Tensor
    num_sinks: int
    window: int
    oldest: int = 0

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D]: the compensation token's logit gets + log(dropped)."""
        bias = torch.zeros(self.k.shape[:3], dtype=torch.float32, device=q.device)
        bias[:, :, self.num_sinks] = self.dropped.log()
        return tokred.biased_attention(q, self.k, self.v, bias, scale=scale)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds one token k [B, H, 1, D], v [B, H, 1, Dv]; the oldest recent one is compensated.

        Raises:
            ValueError: k or v of another shape or dtype than the tokens held, which stay unchanged.

        Complexity: in place, one row is written. Only while there are fewer recent tokens than
        `window`, so after a short prompt, a token takes a copy of the cache.
        """
        for name, token, held in (("k", k, self.k), ("v", v, self.v)):
            check_tokens(name, token, [*held.shape[:2], 1, held.shape[3]], (held.dtype,))
        first = self.num_sinks + 1
        if self.k.shape[2] - first < self.window:
            self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            return
        count = self.dropped[..., None]
        for cache, token in ((self.k, k), (self.v, v)):
            mean, left = cache[:, :, self.num_sinks], cache[:, :, first + self.oldest]
            mean.copy_((count * mean.float() + left.float()) / (count + 1))
            left.copy_(token[:, :, 0])
        self.dropped = self.dropped + 1
        self.oldest = (self.oldest + 1) % self.window


def compress(
    k: Tensor, v: Tensor, num_sinks: int = 4, window: int | None = None, compression: float = 5.0
) -> RazorHeads:
    """The cache of heads that are no retrieval heads, after prefill.

    Args:
        k: [B, H, N, D], rotated keys; v: [B, H, N, Dv].
        num_sinks: first tokens kept, at least 0. A prompt with fewer has as many sinks as tokens;
            tokens that follow are recent ones.
        window: recent tokens kept, at least 1; max(4000, N / compression) where None, as published.
        compression: at least 1.

    Returns:
        RazorHeads. With nothing to drop the compensation token has count 0, that is no weight.

    Raises:
        ValueError: one of these below its smallest.
    """
    check_minimum(0, num_sinks=num_sinks)
    check_number(1, compression=compression)
    tokens = k.shape[2]
    window = max(4000, int(tokens / compression)) if window is None else window
    check_minimum(1, window=window)
    sinks = min(num_sinks, tokens)
    start = max(tokens - window, sinks)

    def shrink(x: Tensor) -> Tensor:
        dropped = x[:, :, sinks:start].float()
        mean = dropped.sum(2, keepdim=True) / max(start - sinks, 1)
        return torch.cat([x[:, :, :sinks], mean.to(x.dtype), x[:, :, start:]], dim=2)

    dropped = torch.full(k.shape[:2], float(start - sinks), device=k.device)
    return RazorHeads(shrink(k), shrink(v), dropped, sinks, window)


def razor_attention(
    q: Tensor, k: Tensor, v: Tensor, retrieval: Tensor, others: RazorHeads,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
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
    """All heads in one pool of packed tokens, each with as many as it keeps.

    k, v: [1, 1, S, ..], S places. The tables have a row for every item and head: slots i32
    [B Hkv, T], where its tokens are in the pool, lengths i32 [B Hkv], how many they are, and bias
    f32 [B Hkv, 1, T], log(dropped) for compensation tokens.

    kinds: i64 [R] and i64 [Hkv - R], the retrieval heads and the others; rooms: how many slots a
    head of either kind has. length: tokens so far. means, dropped: f32 [B, Hkv - R, D | Dv] and
    [B, Hkv - R], what compensation tokens are packed from. entered: tokens that have been in the
    window, of which the last `window` still are, in a ring.

    Memory: the packed tokens; 8 B Hkv T bytes of tables; the means, 4 bytes a number; and from the
    first append on, room for a sixteenth more tokens of retrieval heads (16 at least).
    """

    k: PackedKV
    v: PackedKV
    slots: Tensor
    lengths: Tensor
    bias: Tensor
    kinds: tuple[Tensor, Tensor]
    rooms: tuple[int, int]
    length: int
    means: tuple[Tensor, Tensor]
    dropped: Tensor
    num_sinks: int
    window: int
    entered: int

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D] to all tokens so far, in one call for heads of all lengths.

        Returns:
            out [B, Hq, L, Dv] and lse [B, Hq, L], for `combine_states` with that of other tokens.
        """
        rows = q.reshape(self.slots.shape[0], -1, *q.shape[2:])
        longest = max(n for n, kind in zip(self._held(), self.kinds, strict=True) if len(kind))
        cache = {"length": longest, "lengths": self.lengths, "slots": self.slots}
        cache["key_bias"] = self.bias[:, :, :longest]
        out, lse = tokred.packed_attention(rows, self.k, self.v, scale=scale, **cache)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds tokens of all heads, k [B, Hkv, L, D] and v [B, Hkv, L, Dv], packed as the prompt.

        Retrieval heads keep them all. In other heads a token takes the place of the oldest recent
        one, which joins the mean: (N mean + token) / (N + 1) of what its codes stand for, computed
        and kept in float32, so that packing it again and again adds up no error.

        Raises:
            ValueError: k or v of another shape, no float dtype that `kv_pack` takes, or requiring
                grad; nothing was appended.

        Complexity: packs the new tokens and unpacks those that leave, in place; the pool is copied
        whenever retrieval heads have grown by a sixteenth.
        """
        heads = sum(map(len, self.kinds))
        for name, x, packed in (("k", k, self.k), ("v", v, self.v)):
            shape = [self.slots.shape[0] // heads, heads, *k.shape[2:3], packed.head_dim]
            check_tokens(name, x, shape, (torch.float32, torch.float16, torch.bfloat16))
        refuse_grad("append", k=k, v=v)
        # A ring takes no more than its size at once.
        for part in zip(k.split(self.window, 2), v.split(self.window, 2), strict=True):
            self._append(*part)

    def _held(self) -> tuple[int, int]:
        """Tokens that a retrieval head holds, and another one."""
        return self.length, self.num_sinks + 1 + min(self.entered, self.window)

    def _append(self, k: Tensor, v: Tensor) -> None:
        batch, heads, tokens = k.shape[:3]
        retrieval, others = self.kinds
        whole, sinks = self.length + tokens, self.num_sinks
        room = self.rooms[0] if whole <= self.rooms[0] else whole + max(whole // 16, 16)
        self._make_room(room, sinks + 1 + self.window)
        new = torch.arange(tokens, device=k.device)
        columns = new.new_empty(heads, tokens)
        columns[retrieval] = self.length + new
        columns[others] = sinks + 1 + (self.entered + new) % self.window
        slots = self.slots.view(batch, heads, -1)
        places = slots.gather(2, columns.expand(batch, -1, -1))
        leaving = places[:, others, max(self.window - self.entered, 0) :]
        count, left = self.dropped[..., None], leaving.shape[2]
        for pool, x, mean in zip((self.k, self.v), (k, v), self.means, strict=True):
            rows = pool.map(partial(torch.index_select, dim=2, index=leaving.flatten()))
            old = tokred.kv_unpack(rows)[0, 0].unflatten(0, leaving.shape)
            _write(pool, x, places)
            if leaving.numel() > 0:
                mean.copy_((count * mean + old.sum(2)) / (count + left))
                _write(pool, mean[:, :, None], slots[:, others, sinks, None])
        self.dropped = self.dropped + left
        self.length += tokens
        self.entered += tokens
        self._fill_tables()

    def _make_room(self, first_room: int, other_room: int) -> None:
        """Slots for so many tokens of a retrieval head, and of another one; never fewer."""
        retrieval, others = self.kinds
        rooms = first_room if len(retrieval) else 0, other_room if len(others) else 0
        if rooms == self.rooms:
            return
        more = max(rooms) - self.slots.shape[1]
        self.slots, self.bias = pad(self.slots, (0, more)), pad(self.bias, (0, more))
        slots = self.slots.view(self.dropped.shape[0], -1, max(rooms))
        before = places = self.k.num_tokens
        for kind, first, last in zip(self.kinds, self.rooms, rooms, strict=True):
            shape = slots.shape[0], len(kind), last - first
            fresh = torch.arange(math.prod(shape), dtype=torch.int32, device=slots.device)
            slots[:, kind, first:last] = (fresh + places).view(shape)
            places += len(fresh)
        behind = (0, 0, 0, places - before)
        for name, pool in (("k", self.k), ("v", self.v)):
            setattr(self, name, pool.map(partial(pad, pad=behind)))
        self.rooms = rooms

    def _fill_tables(self) -> None:
        """Writes what the heads hold into lengths and bias."""
        batch, others = self.dropped.shape[0], self.kinds[1]
        for kind, held in zip(self.kinds, self._held(), strict=True):
            self.lengths.view(batch, -1)[:, kind] = held
        if len(others):
            bias = self.bias.view(batch, -1, self.bias.shape[2])
            bias[:, others, self.num_sinks] = self.dropped.log()


def _write(pool: PackedKV, x: Tensor, places: Tensor) -> None:
    """Packs x [B, H, L, D] into a pool [1, 1, S, ..] at places i32 [B, H, L], all different."""
    if x.numel() > 0:
        tokred.kv_append(x.flatten(0, 1)[:, None], pool, 0, slots=places.flatten(0, 1))


def pack_heads(
    k: Tensor, v: Tensor, retrieval: Tensor, others: RazorHeads, key: PackFormat, value: PackFormat
) -> PackedRazorHeads:
    """Packs retrieval heads, which keep all tokens, beside the others, which keep some.

    Args:
        k: [B, R, N, D], v: [B, R, N, Dv], the whole cache of the R retrieval heads.
        retrieval: bool [Hkv], which key heads those are. others: the rest, Hkv - R heads.
        key, value: formats along channels, as tokens of different heads follow each other.

    Raises:
        ValueError: formats along tokens.
    """
    for name, form in (("key", key), ("value", value)):
        if form.axis != "channel":
            raise ValueError(f"{name} must have groups along channels, got axis {form.axis!r}")
    device, rows = k.device, k.shape[0] * len(retrieval)
    mean_k, mean_v = (x[:, :, others.num_sinks] for x in (others.k, others.v))
    retrieval = retrieval.to(device)
    packed = PackedRazorHeads(
        key.empty(1, 1, 0, k.shape[3], device),
        value.empty(1, 1, 0, v.shape[3], device),
        slots=torch.zeros(rows, 0, dtype=torch.int32, device=device),
        lengths=torch.zeros(rows, dtype=torch.int32, device=device),
        bias=torch.zeros(rows, 1, 0, device=device),
        kinds=(retrieval.nonzero()[:, 0], (~retrieval).nonzero()[:, 0]),
        rooms=(0, 0),
        length=k.shape[2],
        means=(mean_k.float().clone(), mean_v.float().clone()),
        dropped=others.dropped,
        num_sinks=others.num_sinks,
        window=others.window,
        entered=others.k.shape[2] - others.num_sinks - 1 + others.oldest,
    )
    packed._make_room(k.shape[2], others.k.shape[2])
    packed._fill_tables()
    slots = packed.slots.view(k.shape[0], len(retrieval), -1)
    for kind, *sides in zip(packed.kinds, (k, others.k), (v, others.v), strict=True):
        for pool, x in zip((packed.k, packed.v), sides, strict=True):
            _write(pool, x, slots[:, kind, : x.shape[2]])
    return packed


METHOD = Method(
    title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    arxiv="2407.15891",
    family=Family.EVICT,
    needs=(Needs.LANGUAGE_MODEL, Needs.CALIBRATION),
    status="exact",
    summary="non-retrieval heads keep sinks, recent tokens and one weighted mean token",
)
