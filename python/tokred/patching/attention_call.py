"""One layer's attention in one forward pass, as methods that choose keys are given it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

import tokred

if TYPE_CHECKING:
    from tokred.ops.kv_pack import PackedKV

Made = TypeVar("Made")


class PackedKeys(Protocol):
    """Keys and values of a PackedCache, in the place of k."""

    length: int

    def score(self, q: Tensor, reduce: str, scale: float | None, mask: Tensor | None) -> Tensor:
        """See AttentionCall.score."""

    def attend(
        self,
        q: Tensor,
        scale: float | None,
        causal: bool,
        mask: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """See AttentionCall.dense."""

    def attend_to(
        self,
        q: Tensor,
        indices: Tensor,
        scale: float | None,
        causal: bool,
        mask: Tensor | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """See AttentionCall.attend_to."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention in one forward pass, as a method is given it.

    q: [B, Hq, L, D]. k: [B, Hkv, N, D] and v: [B, Hkv, N, Dv], the whole cache and the new tokens.
        Of a PackedCache that is not empty, k is its packed keys, and v None: `dense`, `score` and
        `attend_to` read it, what needs tensors raises an error that says so.
    mask: bool [B | 1, 1, L | 1, N], True is visible, or None. For `dense` alone, where there is no
        method, also numbers [B | 1, Hq | 1, L | 1, N] that are added to the logits.
    causal: query i sees the keys j <= i + N - L, in addition to the mask.
    scale: of the logits.
    layer: the number of this layer among those that the method attends for, from 0.
    rotary: where q and k come without rotation, what rotates them; None where they are rotated.
    window: query i sees only the last `window` keys up to its own, or None.
    carried: what earlier layers of the same forward pass have left here for later ones. A method
        keeps nothing else from call to call: its object is shared by threads.
    in_prompt: an earlier layer of the pass had several queries; models whose last layers share
        keys ask these for the last tokens only.
    softcap: logits s become softcap * tanh(s / softcap) in `dense` and `attend_to`, or None. Those
        of `score` are s itself: the order of keys is the same.
    score_keys: a copy of the keys in a few bits, which `score` reads instead of k; or None.
    other_heads: the process group whose ranks have this layer's other heads, in tensor parallelism;
        "unknown" where the heads are not all here, and no group is known to have the others.
    """

    q: Tensor
    k: Any  # a Tensor or PackedKeys
    v: Any  # a Tensor or None
    mask: Tensor | None
    causal: bool
    scale: float | None
    layer: int = 0
    rotary: Any = None
    window: int | None = None
    carried: dict[str, Any] = field(default_factory=dict)
    in_prompt: bool = False
    softcap: float | None = None
    score_keys: PackedKV | None = None
    other_heads: Any = None

    @property
    def num_keys(self) -> int:
        """N."""
        return self.k.length if self.is_packed else self.k.shape[2]

    @property
    def is_prompt(self) -> bool:
        """Whether the forward pass brings several tokens at once."""
        return self.in_prompt or self.q.shape[2] > 1

    @property
    def is_packed(self) -> bool:
        """Whether the keys are those of a PackedCache."""
        return not isinstance(self.k, Tensor)

    def score(self, reduce: str = "none", mask: Tensor | None = None) -> Tensor:
        """The logits of the keys, as `qk_score` reduces them: f32 [B, Hq | Hkv | 1, N].

        They choose, and carry no gradient.

        Args:
            reduce: see tokred.qk_score.
            mask: bool [B | 1, N], keys that get a score; `visible()` where None.
        """
        mask = self.visible() if mask is None else mask
        if self.is_packed:
            scores = self.k.score(self.q.detach(), reduce, self.scale, mask)
        elif self.score_keys is not None:
            scores = tokred.packed_qk_score(
                self.q.detach(), self.score_keys, reduce=reduce, scale=self.scale, mask=mask
            )
        else:
            q, k = self.q.detach(), self.k.detach()
            scores = tokred.qk_score(q, k, reduce, scale=self.scale, mask=mask)
        if self.other_heads is not None and reduce in ("head_mean", "softmax_vote"):
            return self._over_all_heads(scores, reduce)
        return scores

    def _over_all_heads(self, scores: Tensor, reduce: str) -> Tensor:
        """The scores of all ranks' heads together, the same bits on every rank."""
        if self.other_heads == "unknown":
            raise ValueError(
                "all heads choose together, and this process has some of them only: make the model "
                "parallel with torch's parallelize_module before tokred.patch"
            )
        torch.distributed.all_reduce(scores, group=self.other_heads)
        return scores if reduce == "softmax_vote" else scores / self.other_heads.size()

    def attend_to(self, indices: Tensor, block_q: int) -> tuple[Tensor, Tensor]:
        """Attention to the keys of lists: (out [B, Hq, L, Dv], lse f32 [B, Hq, L]).

        Args:
            indices: i32 [B, Hq | Hkv | 1, ceil(L / block_q), K]; those that the mask and causality
                hide are left out.
            block_q: queries that share a list; 1 or L of packed keys.
        """
        if self.is_packed:
            return self.k.attend_to(
                self.q, indices, self.scale, self.causal, self.mask, self.softcap
            )
        options = {
            "causal": self.causal,
            "mask": self.mask,
            "block_q": block_q,
            "softcap": self.softcap,
        }
        return tokred.sparse_attention(self.q, self.k, self.v, indices, self.scale, **options)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Attention over all keys: (out [B, Hq, L, Dv], lse f32 [B, Hq, L])."""
        q, k = self.q, self.k
        if self.is_packed and self.rotary is None:
            return k.attend(q, self.scale, self.causal, self.mask, self.softcap)
        if self.rotary is not None:
            keys = k.shape[2]
            k = self.rotary.rotate(k, (self.visible().cumsum(-1) - 1).clamp(min=0), keys)
            q = self.rotary.rotate(q, self._query_ranks().clamp(min=0), keys)
        if self.window is None:
            return tokred.biased_attention(
                q,
                k,
                self.v,
                causal=self.causal,
                scale=self.scale,
                mask=self.mask,
                softcap=self.softcap,
            )
        query, key = self._window_positions()
        return tokred.biased_attention(
            q,
            k,
            self.v,
            scale=self.scale,
            mask=self.mask,
            query_position=query,
            key_position=key,
            softcap=self.softcap,
        )

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """make(), made once for all layers of the pass that have this mask and as many keys."""
        known = self.carried.get(name)
        if known is None or known[0] is not self.mask or known[1] != self.num_keys:
            known = self.carried[name] = self.mask, self.num_keys, make()
        return known[2]

    def narrow(self, start: int, stop: int) -> AttentionCall:
        """The same for the queries start .. stop - 1, with the keys they can see."""
        if (start, stop) == (0, self.q.shape[2]):
            return self
        q = self.q[:, :, start:stop]
        if not self.causal:
            mask = self.mask
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, start:stop]
            return replace(self, q=q, mask=mask)
        keys = self.k.shape[2] - self.q.shape[2] + stop
        mask = None if self.mask is None else self.mask[..., :keys]
        codes = self.score_keys
        if codes is not None:
            codes = codes.map(lambda x: x[:, :, :keys])
        k, v = self.k[:, :, :keys], self.v[:, :, :keys]
        return replace(self, q=q, k=k, v=v, mask=mask, score_keys=codes)

    def visible(self) -> Tensor:
        """bool [B | 1, N]: the keys that the last query, or any query, can see."""
        if self.mask is None:
            return torch.ones(1, self.num_keys, dtype=torch.bool, device=self.q.device)
        if self.mask.shape[1] != 1:
            raise ValueError("keys can only be chosen under a mask that all heads share")
        return self.mask[:, 0].any(1)

    def num_visible(self) -> Tensor:
        """int [B | 1, L]: how many keys each query sees, leaving the window aside."""
        queries, keys = self.q.shape[2], self.num_keys
        if self.mask is not None and self.mask.shape[2] > 1 and not self.causal:
            return self.mask[:, 0].sum(-1)
        rank = self.visible().cumsum(-1)
        return rank[:, keys - queries :] if self.causal else rank[:, -1:].expand(-1, queries)

    def _query_ranks(self) -> Tensor:
        """int [B | 1, L]: the rank of the last key that each query sees, among all visible keys.

        Fewer keys are visible to a query where a mask keeps sequences in one row apart.
        """
        if self.mask is None or self.mask.shape[2] == 1 or self.causal:
            return self.num_visible() - 1
        rank = self.visible().cumsum(-1) - 1
        place = torch.arange(self.num_keys, device=rank.device)
        return rank.gather(1, (self.mask[:, 0] * place).amax(-1))

    def _window_positions(self) -> tuple[Tensor, Tensor]:
        """Position columns for which key <= query says: not later, and within the window."""
        assert self.window is not None
        queries, keys = self.q.shape[2], self.k.shape[2]
        key = torch.arange(keys, dtype=torch.int32, device=self.q.device)
        query = key[keys - queries :]
        columns = torch.stack([query, self.window - 1 - query], -1), torch.stack([key, -key], -1)
        return columns[0][None], columns[1][None]
