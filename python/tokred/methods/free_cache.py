"""FreeCache: a diffusion language model keeps the keys of finished tokens, and attends both ways.

FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided
Diffusion (arXiv 2505.21467). Guided diffusion, its other half, is a decoding policy and not here.
"""

from __future__ import annotations

from torch import Tensor

import tokred

from ._lists import check_tokens
from ._method import Family, Method, Needs


class FreeCache:
    """Keys and values of the prompt and of finished blocks, one layer, in a buffer made once.

    Keys are kept unrotated where the model rotates them anew at each step, or rotated where their
    positions are final; the cache does not look at them.
    """

    def __init__(self, k: Tensor, v: Tensor, capacity: int) -> None:
        """Starts from a prompt k [B, H, N, D], v [B, H, N, Dv], with room for `capacity` tokens.

        Raises:
            ValueError: the prompt is longer than the capacity.
        """
        if k.shape[2] > capacity:
            raise ValueError(
                f"capacity must be at least the {k.shape[2]} tokens of k, got {capacity}"
            )
        self._k = k.new_empty(*k.shape[:2], capacity, k.shape[3])
        self._v = v.new_empty(*v.shape[:2], capacity, v.shape[3])
        self.length = 0
        self.freeze(k, v)

    @property
    def k(self) -> Tensor:
        """[B, H, length, D], a view."""
        return self._k[:, :, : self.length]

    @property
    def v(self) -> Tensor:
        """[B, H, length, Dv], a view."""
        return self._v[:, :, : self.length]

    def freeze(self, k: Tensor, v: Tensor) -> None:
        """Appends a finished block k [B, H, n, D], v [B, H, n, Dv].

        Raises:
            ValueError: it does not fit, or is of another shape or dtype than the cache, which is
                unchanged.
        """
        tokens = k.shape[2:3]
        for name, x, held in (("k", k, self._k), ("v", v, self._v)):
            check_tokens(name, x, [*held.shape[:2], *tokens, held.shape[3]], (held.dtype,))
        end = self.length + k.shape[2]
        if end > self._k.shape[2]:
            raise ValueError(f"the cache has room for {self._k.shape[2]} tokens, not for {end}")
        self._k[:, :, self.length : end] = k
        self._v[:, :, self.length : end] = v
        self.length = end

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of the active tokens to the frozen ones and to each other, in both directions.

        Args:
            q: [B, Hq, A, D], k: [B, H, A, D], v: [B, H, A, Dv] of the active tokens.
            mask: bool [B, length + A], False where a key does not count.

        Returns:
            [B, Hq, A, Dv]. The frozen and the active part are never copied together.
        """
        frozen, active = (None, None) if mask is None else mask.split((self.length, k.shape[2]), 1)
        done = tokred.biased_attention(q, self.k, self.v, scale=scale, mask=frozen)
        new = tokred.biased_attention(q, k, v, scale=scale, mask=active)
        return tokred.combine_states(*done, *new)[0]


def active_tokens(finished: Tensor) -> tuple[Tensor, Tensor]:
    """The positions still to be decoded: i32 [B, N] with -1 padding and their numbers i32 [B].

    Args:
        finished: bool [B, N].
    """
    return tokred.compact(~finished)


METHOD = Method(
    title=(
        "FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and "
        "Guided Diffusion"
    ),
    arxiv="2505.21467",
    family=Family.REUSE,
    needs=(Needs.DIFFUSION_LANGUAGE_MODEL,),
    status="exact",
    summary="diffusion language models keep the keys of finished blocks",
)
