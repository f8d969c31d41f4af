"""A layer's stored keys after a forward pass, and how a method that evicts answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokred

_CAPPED_QUERIES = 64  # under a softcap, queries whose weights are in memory at a time


@dataclass(eq=False, slots=True)
class Eviction:
    """Which of the M stored keys of a layer stay.

    slots: i32 [B, Hkv, K], the keys that stay; heads with fewer than K end with -1. None: all stay,
        or all but `dropped`.
    dropped: int32 [B, Hkv, 1], the one key of each head that goes; or None.
    padded: whether slots may hold -1.
    state: f32 [B, Hkv, M] by name, a number for every stored key. The next call has it as its
        `state`, for the keys that stayed, with 0 for new ones.
    cleared: whether the state of dropped keys is 0 already, or will be given by known().
    """

    slots: Tensor | None = None
    dropped: Tensor | None = None
    padded: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    cleared: bool = False


@dataclass(frozen=True)
class Replacement:
    """New keys and values instead of the stored ones, as methods that merge make them.

    k: [B, Hkv, K, D]. v: [B, Hkv, K, Dv].
    position: i32 [B, Hkv, K], where they stand in the sequence.
    bias: f32 [B, Hkv, K], what attention adds to their logits, -inf where there is no key; None
        for 0.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    bias: Tensor | None = None


@dataclass(eq=False, slots=True)
class EvictionCall:
    """One layer's stored keys after the attention of a forward pass.

    q: [B, Hq, L, D], the queries of the pass.
    k: [B, Hkv, M, D] and v: [B, Hkv, M, Dv], the stored tokens in any order, but the L new ones
        last, or a single new one in new_slot. Keys are rotated as the model does it, to their own
        positions. In a packed cache they are unpacked when they are asked for.
    lse: f32 [B, Hq, L], of the attention of these queries to these keys.
    position: i32 [B, Hkv, M], the position of every key in the text, padding counted; -1 for none.
    bias: f32 [B, Hkv, M], what attention adds to the logits of a key: -inf where it is hidden (it
        is padding, or no key), the logarithm of the tokens that it stands for; None: 0.
    length: tokens so far, evicted ones and padding included.
    start: i32 [B], the first token that is no padding; None: 0.
    scale: of the logits, or None.
    layer: the number of this layer among num_layers of full attention, from 0.
    state: f32 [B, Hkv, M] by name, from the Eviction of the call before; 0 for new tokens.
    rotary: the model's rotary embedding, or None.
    new_k: [B, Hkv, L, D], the keys of the pass.
    new_slot: int32 [B, Hkv, 1], where the new token is stored; None: the new tokens are the last.
    softcap: of the logits, before the bias; or None.
    mask: bool [B | 1, 1, L, N], what each query sees, where that does not follow from causality and
        bias; or None.
    """

    q: Tensor
    stored_k: Any  # a Tensor, or a PackedBuffer with `tokens` and `packed`
    stored_v: Any
    lse: Tensor
    position: Tensor
    bias: Tensor | None
    length: int
    start: Tensor | None
    scale: float | None
    layer: int
    num_layers: int
    state: dict[str, Tensor]
    rotary: Any
    new_k: Tensor
    new_slot: Tensor | None = None
    softcap: float | None = None
    mask: Tensor | None = None

    @property
    def k(self) -> Tensor:
        """See above."""
        return self.stored_k if isinstance(self.stored_k, Tensor) else self.stored_k.tokens

    @property
    def v(self) -> Tensor:
        """See above."""
        return self.stored_v if isinstance(self.stored_v, Tensor) else self.stored_v.tokens

    @property
    def heads(self) -> int:
        """Hkv."""
        return self.position.shape[1]

    @property
    def stored(self) -> int:
        """M."""
        return self.position.shape[2]

    @property
    def is_prompt(self) -> bool:
        """Whether the forward pass brought several tokens at once."""
        return self.q.shape[2] > 1

    def received(self, last: int | None = None, reduce: str = "sum") -> Tensor:
        """The attention that every stored key received: f32 [B, Hkv, M], the mean of its group.

        Args:
            last: from so many of the last queries of the pass; all of them where None.
            reduce: over the queries, "sum", "mean" or "max"; see attention_columns. Padding among
                the queries counts for nothing.

        2 B Hq last M D flops; nothing else is stored.
        """
        if self.q.shape[2] == 1:
            return self._received_from_one()
        count = self.q.shape[2] if last is None else min(last, self.q.shape[2])
        q, lse = self.q[:, :, -count:], self.lse[..., -count:]
        mask = weight = None
        if self.bias is not None:
            group = q.shape[1] // self.k.shape[1]
            mask = (self.bias > -torch.inf).repeat_interleave(group, 1)
            weight = mask[:, :1, -count:].float()
            mask = mask[:, :, None]
        if self.mask is not None:
            mask = self.mask[:, :, -count:]
        if self.softcap is None:
            columns = tokred.attention_columns(
                q, self.k, lse.contiguous(), reduce, weight, causal=self.mask is None,
                scale=self.scale, mask=mask,
            )  # fmt: skip
        else:
            columns = self._capped_columns(q, lse, reduce, weight, mask)
        heads = columns.unflatten(1, (self.k.shape[1], -1)).mean(2)
        # A key that stands for n tokens receives n times the weight of its logit.
        return heads if self.bias is None else heads * self.bias.exp()

    def _capped_columns(
        self, q: Tensor, lse: Tensor, reduce: str, weight: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """attention_columns under a softcap, with the weights of some queries at a time."""
        k, count = self.k, q.shape[2]
        total = torch.zeros(*q.shape[:2], k.shape[2], device=q.device)
        for start in range(0, count, _CAPPED_QUERIES):
            part = slice(start, min(start + _CAPPED_QUERIES, count))
            own = mask
            if self.mask is not None and mask is not None:
                seen, own = k.shape[2], mask[:, :, part]
            else:
                seen = k.shape[2] - count + part.stop
            rows = tokred.attention_rows(
                q[:, :, part], k[:, :, :seen], False, causal=self.mask is None, scale=self.scale,
                mask=None if own is None else own[..., :seen],
            )  # fmt: skip
            # tanh would make the -inf of a hidden key finite.
            p = torch.where(
                rows > -torch.inf, (self._capped(rows) - lse[:, :, part, None]).exp(), 0
            )
            if weight is not None:
                p = p.nan_to_num(0) * weight[:, :, part, None]
            into = total[..., :seen]
            if reduce == "max":
                torch.maximum(into, p.amax(2), out=into)
            else:
                into += p.sum(2)
        if reduce == "mean":
            total /= count
        return total

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _received_from_one(self) -> Tensor:
        """`received` from a single query: f32 [B, Hkv, M]."""
        shape = self.q.shape[0], self.heads, -1, self.stored
        k, bias = self.stored_k, self.bias
        if not isinstance(k, Tensor):
            rows = tokred.packed_qk_score(self.q, k.packed, scale=self.scale)
        elif bias is None and self.softcap is None:
            return tokred.attention_rows(self.q, k, scale=self.scale).view(shape).mean(2)
        else:
            rows = tokred.attention_rows(self.q, k, False, scale=self.scale)
        logits = self._capped(rows).view(shape) - self.lse.view(*shape[:3], 1)
        if bias is None:
            return logits.exp().mean(2)
        logits = logits + bias[:, :, None]
        own = bias[..., -1:] if self.new_slot is None else bias.gather(2, self.new_slot)
        return logits.exp().nan_to_num(0).mean(2) * (own > -torch.inf)

    def known(self, name: str, new: Tensor) -> Tensor:
        """f32 [B, Hkv, M]: the state of that name, and `new`, f32 [B, Hkv, L], for new tokens; of a
        token in a slot it is written into the state."""
        before = self.state.get(name)
        if before is None:
            return new
        if self.new_slot is None:
            return torch.cat([before[..., : -new.shape[2]], new], 2)
        return before.scatter_(2, self.new_slot, new)

    def visible(self) -> Tensor | None:
        """bool [B, Hkv, M]: the keys that are not hidden; None: all."""
        return None if self.bias is None else self.bias > -torch.inf

    def recent(self, count: int) -> Tensor:
        """bool [B, Hkv, M]: the last tokens of the sequence."""
        return self.position >= self.length - count

    def first(self, count: int) -> Tensor:
        """bool [B, Hkv, M]: the first tokens of the sequence, padding left aside."""
        if self.start is None:
            return (
                self.position < count
                if self.bias is None
                else ((self.position >= 0) & (self.position < count))
            )
        position = self.position - self.start[:, None, None]
        return (position >= 0) & (position < count)

    def is_one_over(self, budget: int) -> bool:
        """Whether one token came, and made the keys one more than the budget."""
        return self.stored == budget + 1 and not self.is_prompt

    def drop(
        self,
        scores: Tensor | None = None,
        name: str | None = None,
        received: bool = False,
        shared: bool = False,
        first: int = 0,
        recent: int = 0,
        largest: bool = False,
    ) -> Eviction:
        """One key of every head goes, in a single op; see tokred.eviction_slot.

        Args:
            scores: f32 [B, Hkv, M], what keys are ranked by; their positions where there is neither
                this nor received.
            name: of the state that the scores stay in, with what was added to them.
            received: whether the attention from the one query of the pass is added.
            shared, first, recent, largest: as there.
        """
        logits = lse = None
        if received:
            k, scale = self.stored_k, self.scale
            if isinstance(k, Tensor):
                logits = tokred.attention_rows(self.q, k, False, scale=scale).squeeze(2)
            else:
                logits = tokred.packed_qk_score(self.q, k.packed, scale=scale)
            lse = self.lse
        slot, total = tokred.eviction_slot(
            self.position, self.length, scores, logits, lse, self.bias, self.start, self.new_slot,
            first, recent, shared, largest, self.softcap,
        )  # fmt: skip
        kept = total if received else scores
        if name is None or kept is None:
            return Eviction(dropped=slot)
        return Eviction(dropped=slot, state={name: kept}, cleared=True)

    def replaced(
        self, k: Tensor, v: Tensor, position: Tensor, bias: Tensor | None = None
    ) -> Replacement:
        """New keys and values instead of the stored ones; see Replacement."""
        return Replacement(k, v, position, bias)

    def all(self, **state: Tensor) -> Eviction:
        """Every key stays."""
        return Eviction(state=state)

    def best(
        self, scores: Tensor, budget: int, row_budget: Tensor | None = None, **state: Tensor
    ) -> Eviction:
        """The keys of largest score stay, in the order of their positions.

        Args:
            scores: f32 [B, Hkv, M]; inf for a key that must stay. Hidden keys and NaN go first. Of
                equal scores the later key goes; where only one key goes, the one stored first.
            budget: how many stay. row_budget: i32 [B, Hkv], of every head, at most the budget.
            state: see Eviction.
        """
        excess = self.stored - budget
        if excess <= 0 and row_budget is None:
            return self.all(**state)
        if excess == 1 and row_budget is None and not self.is_prompt:
            return Eviction(dropped=self.drop(scores.contiguous()).dropped, state=state)
        if self.bias is not None:
            scores = scores.masked_fill(self.bias == -torch.inf, -torch.inf)
        _, slots = tokred.topk(
            scores.contiguous(), min(budget, self.stored), order="position", row_k=row_budget
        )
        padded = self.bias is not None or row_budget is not None
        return Eviction(slots, padded=padded, state=state)
