"""What a layer of tokred.PackedCache passes to the attention in place of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

import tokred
from tokred.ops.kv_pack import PackedKV

ADVICE = (
    "the keys and values are packed, in a tokred.PackedCache, and only tokred's attention reads "
    'them: call model.set_attn_implementation("tokred"), with a method that works on packed keys '
    "or none, and reset() the cache, which has taken the tokens of this call; a model that "
    "computes with cached keys itself needs a transformers.DynamicCache"
)


@dataclass(frozen=True, eq=False)
class PackedStates:
    """A layer's cache after the tokens of a forward pass were appended.

    It is no tensor; using it as one raises an error that says what to do, `advice`.

    key, value: the packed tokens, [B, Hkv, N, D] and [B, Hkv, N, Dv] with N their capacity.
    key_window, value_window: the last tokens in full precision, as `kv_append` keeps them, or None.
    length: tokens in the cache, those of this pass included.
    new_key, new_value: [B, Hkv, L, D] and [B, Hkv, L, Dv], of the tokens of this pass, in full
        precision.
    key_mean: [B, Hkv, 1, D], subtracted from every key in the cache, or None. Subtracting it
        changes all logits of a query by the same amount, so out needs no correction; scores and lse
        get it back. A softcap needs whole logits, and refuses it.
    """

    key: PackedKV
    value: PackedKV
    key_window: Tensor | None
    value_window: Tensor | None
    length: int
    new_key: Tensor
    new_value: Tensor
    key_mean: Tensor | None = None

    advice: ClassVar[str] = ADVICE

    @property
    def shape(self) -> torch.Size:
        """That of the keys that it stands for, [B, Hkv, N, D]."""
        batch, heads, _, dim = self.new_key.shape
        return torch.Size((batch, heads, self.length, dim))

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before: then the new keys and values are all there are."""
        return self.length == self.new_key.shape[2]

    def refuse_cross_attention(self, module: nn.Module, is_causal: bool) -> None:
        """Refuses a cache that an encoder-decoder uses for both of its decoder's attentions.

        Raises:
            ValueError: it holds what came from the encoder behind the decoder's own tokens.
        """
        config = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) and not is_causal:
            raise ValueError(
                "a tokred.PackedCache holds the decoder's own tokens, and cross-attention to an "
                "encoder needs a cache of its own: pass transformers.EncoderDecoderCache("
                "tokred.PackedCache(config), transformers.DynamicCache(config=config))"
            )

    def attend(
        self,
        q: Tensor,
        scale: float | None,
        causal: bool,
        mask: Tensor | None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over all tokens: (out [B, Hq, L, Dv], lse f32 [B, Hq, L]).

        A single query reads the cache alone, where the newest token is in full precision if there
        is a window. Several queries attend to the new tokens in full precision, whatever the
        window, and to the older ones in the cache.
        """
        if q.shape[2] == 1:
            return self._from_cache(q, scale, softcap, mask=mask)
        older = self.length - self.new_key.shape[2]
        seen = torch.arange(self.length, device=q.device) < older
        seen = seen[None, None, None]
        if mask is not None:
            seen = mask.where(seen, -torch.inf if mask.is_floating_point() else False)
        own = None if mask is None else mask[..., older:]
        from_cache = self._from_cache(q, scale, softcap, mask=seen)
        from_new = tokred.biased_attention(
            q,
            _as(self.new_key, q),
            _as(self.new_value, q),
            causal=causal,
            scale=scale,
            mask=own,
            softcap=softcap,
        )
        return tokred.combine_states(*from_cache, *from_new)

    def attend_to(
        self,
        q: Tensor,
        indices: Tensor,
        scale: float | None,
        causal: bool,
        mask: Tensor | None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention to listed tokens, read from the cache; see tokred.packed_attention."""
        return self._from_cache(q, scale, softcap, mask=mask, causal=causal, indices=indices)

    def score(self, q: Tensor, reduce: str, scale: float | None, mask: Tensor | None) -> Tensor:
        """See tokred.packed_qk_score."""
        mean = self._mean_logits(q, scale)
        if mean is None or reduce == "softmax_vote":
            return self._score(q, reduce, scale, mask)
        mean = mean.mean(2, keepdim=True)  # as scores are of the mean of the queries
        grouped = mean.unflatten(1, (self.key.codes.shape[1], -1))
        if reduce == "group_max":
            logits = self._score(q, "none", scale, mask) + mean
            return logits.unflatten(1, grouped.shape[1:3]).amax(2)
        added = {"none": mean, "group_mean": grouped.mean(2)}
        return self._score(q, reduce, scale, mask) + added.get(reduce, mean.mean(1, keepdim=True))

    def _score(self, q: Tensor, reduce: str, scale: float | None, mask: Tensor | None) -> Tensor:
        return tokred.packed_qk_score(
            q, self.key, _as(self.key_window, q), reduce, scale, self.length, mask=mask
        )

    def _from_cache(
        self, q: Tensor, scale: float | None, softcap: float | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if softcap is not None and self.key_mean is not None:
            raise ValueError(
                f"softcap = {softcap} needs whole logits, and the cache packs keys without their "
                "mean: make it with center=False"
            )
        windows = _as(self.key_window, q), _as(self.value_window, q)
        options |= {"length": self.length, "softcap": softcap}
        out, lse = tokred.packed_attention(q, self.key, self.value, *windows, scale, **options)
        mean = self._mean_logits(q, scale)
        return out, lse if mean is None else lse + mean

    def _mean_logits(self, q: Tensor, scale: float | None) -> Tensor | None:
        """f32 [B, Hq, L]: what the mean of the keys adds to the logits of a query."""
        if self.key_mean is None:
            return None
        if q.shape[2] == 1:
            return tokred.qk_score(q, _as(self.key_mean, q), scale=scale)
        batch, heads, queries, dim = q.shape
        rows = q.reshape(batch, self.key_mean.shape[1], -1, dim).float()
        logits = rows @ self.key_mean.float().mT
        return logits.reshape(batch, heads, queries) * (dim**-0.5 if scale is None else scale)

    def __getitem__(self, index: Any) -> NoReturn:
        raise ValueError(f"no slices: {self.advice}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r}: {type(self).advice}")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        # Not a TypeError: of operators torch would make "unsupported operand" of it.
        raise ValueError(f"{getattr(function, '__name__', function)}: {cls.advice}")


def _as(window: Tensor | None, q: Tensor) -> Tensor | None:
    """The window in the dtype of the queries: under autocast they may differ."""
    return window if window is None else window.to(q.dtype)
