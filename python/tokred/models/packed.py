"""What a layer of tokred.PackedCache hands to the attention in the place of its keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

import tokred
from tokred.ops.kv_pack import PackedKV

ADVICE = (
    "the keys and values are packed, in a tokred.PackedCache, and only tokred's attention reads "
    'them: call model.set_attn_implementation("tokred"), with a method that works on packed keys '
    "or none, or use a transformers.DynamicCache"
)


@dataclass(frozen=True, eq=False)
class PackedStates:
    """A layer's cache after the tokens of a forward pass were appended; no tensor, says so if used.

    key, value: the packed tokens, [B, Hkv, N, D] and [B, Hkv, N, Dv] with N their capacity.
    key_window, value_window: the last tokens in full precision, as `kv_append` keeps them, or None.
    length: tokens in the cache, those of this pass included.
    new_key, new_value: [B, Hkv, L, D] and [B, Hkv, L, Dv], those of this pass as the model made
        them.
    """

    key: PackedKV
    value: PackedKV
    key_window: Tensor | None
    value_window: Tensor | None
    length: int
    new_key: Tensor
    new_value: Tensor

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before: then the new keys and values are all there are."""
        return self.length == self.new_key.shape[2]

    def attend(
        self, q: Tensor, scale: float | None, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over all tokens: (out [B, Hq, L, Dv], lse f32 [B, Hq, L]).

        A single query reads the cache alone, where the newest token is in full precision if there
        is a window. Several queries attend to the new tokens in full precision, whatever the
        window, and to the older ones in the cache.
        """
        if q.shape[2] == 1:
            return self._from_cache(q, scale, mask=mask)
        older = self.length - self.new_key.shape[2]
        seen = torch.arange(self.length, device=q.device) < older
        seen = seen[None, None, None] if mask is None else mask & seen
        own = None if mask is None else mask[..., older:]
        from_cache = self._from_cache(q, scale, mask=seen)
        from_new = tokred.biased_attention(
            q, self.new_key, self.new_value, causal=causal, scale=scale, mask=own
        )
        return tokred.combine_states(*from_cache, *from_new)

    def attend_to(
        self, q: Tensor, indices: Tensor, scale: float | None, causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention to listed tokens, read from the cache; see tokred.packed_attention."""
        return self._from_cache(q, scale, mask=mask, causal=causal, indices=indices)

    def score(self, q: Tensor, reduce: str, scale: float | None, mask: Tensor | None) -> Tensor:
        """See tokred.packed_qk_score."""
        return tokred.packed_qk_score(
            q, self.key, self.key_window, reduce, scale, self.length, mask=mask
        )

    def _from_cache(self, q: Tensor, scale: float | None, **options: Any) -> tuple[Tensor, Tensor]:
        windows = (self.key_window, self.value_window)
        return tokred.packed_attention(
            q, self.key, self.value, *windows, scale, length=self.length, **options
        )

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(f"no slices: {ADVICE}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"no {name!r}: {ADVICE}")

    @classmethod
    def __torch_function__(cls, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{getattr(function, '__name__', function)}: {ADVICE}")
