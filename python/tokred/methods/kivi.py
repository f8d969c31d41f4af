"""KIVI: keys in 2 bits per channel, values in 2 bits per token, the last tokens as they are.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750).

A decoding step appends its token, attends, and then packs: all keys in full precision once there
are `residual` of them, and the oldest value once there are more than `residual`. `kv_append` packs
when the next token arrives instead, so the windows at attention are the published ones with room
for `residual` keys and residual + 1 values. Prompts attend in full precision.

Different from the released code: scales, minima and codes are computed in float32 whatever the
dtype, and scales and minima are stored in float16. A prompt may come in parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred
from tokred import PackFormat
from tokred._library import refuse_grad

from ._lists import check_minimum, check_query, check_tokens
from ._method import Family, Method, Needs


class KiviCache:
    """The keys and values of one layer: packed tokens, then windows in full precision."""

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        value_dim: int | None = None,
        bits: int = 2,
        group_size: int = 32,
        residual: int = 128,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Room for `capacity` tokens beside the windows.

        Args:
            bits: of keys and values, 2 or 4 as published; any that `kv_pack` knows.
            group_size: tokens that share a scale in a channel of the keys, and channels that do in
                a token of the values (at most value_dim).
            residual: tokens in full precision, a multiple of group_size.

        Raises:
            ValueError: it is not, or a number is below 1 (capacity below 0).
        """
        check_minimum(1, batch=batch, heads=heads, head_dim=head_dim, group_size=group_size)
        check_minimum(0, capacity=capacity)
        if residual < 1 or residual % group_size:
            raise ValueError(
                f"residual must be a multiple of group_size = {group_size}, got {residual}"
            )
        value_dim = head_dim if value_dim is None else value_dim
        rows = -(-capacity // group_size) * group_size
        along_tokens = PackFormat(bits, group_size, "token")
        along_channels = PackFormat(bits, min(group_size, value_dim))
        self.length = 0
        self.packed_k = along_tokens.empty(batch, heads, rows, head_dim, device)
        self.packed_v = along_channels.empty(batch, heads, rows, value_dim, device)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.window_k = torch.zeros(batch, heads, residual, head_dim, **options)
        self.window_v = torch.zeros(batch, heads, residual + 1, value_dim, **options)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds tokens k [B, Hkv, L, D] and v [B, Hkv, L, Dv].

        Raises:
            ValueError: k or v of another shape or dtype than the windows, with a last dimension
                that is not contiguous, or requiring grad.
            RuntimeError: the cache has no room for them. It is unchanged in either case.
        """
        tokens = k.shape[2:3]
        for name, x, window in (("k", k, self.window_k), ("v", v, self.window_v)):
            shape = [*window.shape[:2], *tokens, window.shape[3]]
            check_tokens(name, x, shape, (window.dtype,))
            if x.stride(3) != 1:
                raise ValueError(f"{name} must have a last dimension of stride 1, got {x.stride()}")
        refuse_grad("append", k=k, v=v)
        # Keys are packed sooner than values, so it is they that run out of room first.
        tokred.kv_append(k, self.packed_k, self.length, self.window_k)
        tokred.kv_append(v, self.packed_v, self.length, self.window_v)
        self.length += k.shape[2]

    def attend(
        self, q: Tensor, mask: Tensor | None = None, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention of q [B, Hq, L, D], the last L tokens, to all tokens: out and lse.

        mask: bool [B | 1, Hq | 1, L | 1, T] or [B, T]. One read of the codes.
        """
        return tokred.packed_attention(
            q,
            self.packed_k,
            self.packed_v,
            self.window_k,
            self.window_v,
            scale,
            mask=mask,
            causal=True,
            length=self.length,
        )

    def step(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Appends tokens and attends to them and all before: [B, Hq, L, Dv].

        A single token is attended to with those in its windows; several, a prompt or a part of
        one, see each other in full precision and only what was there before packed.

        Args:
            q: [B, Hq, L, D]; k: [B, Hkv, L, D]; v: [B, Hkv, L, Dv].

        Raises:
            ValueError, RuntimeError: as append, or a q that does not fit k; the cache is unchanged.
        """
        check_query(q, k)
        if q.shape[2] == 1:
            self.append(k, v)
            return self.attend(q, scale=scale)[0]
        state = tokred.biased_attention(q, k, v, causal=True, scale=scale)
        if self.length > 0:
            past = tokred.packed_attention(
                q,
                self.packed_k,
                self.packed_v,
                self.window_k,
                self.window_v,
                scale,
                length=self.length,
            )
            state = tokred.combine_states(*past, *state)
        self.append(k, v)
        return state[0]


METHOD = Method(
    title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    arxiv="2402.02750",
    family=Family.QUANTIZE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="keys in 2 bits per channel, values in 2 bits per token, recent ones as they are",
)
