"""Cores that attend to all tokens in a smaller form: merged, or keys and values in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import (
    biased_attention,
    bipartite_soft_matching,
    gather_tokens,
    kv_pack,
    merge,
    num_out,
    packed_attention,
    unmerge,
)

__all__ = ["MergedCore", "PackedKVCore"]


class MergedCore(nn.Module):
    """Merge similar tokens, attend between the merged ones, and copy each result to its tokens.

    Tokens are matched by their keys, averaged over the heads, and the attention is proportional to
    the sizes of the merged tokens (ToMe, arXiv:2210.09461); all tokens come back after it (tomesd,
    arXiv:2303.17604). With r = 0 the result is `biased_attention`'s, bit for bit.

    Args:
        r: how many tokens merge into others, at most half of those after the prefix; or
        ratio: the share of the tokens. One of the two.
        num_prefix: leading tokens that stay as they are, such as a class token.
        merge_queries: for self-attention; False leaves the queries as they are, whatever their
            number.
        scale: of the logits; 1 / sqrt(D) where None.

    Which tokens merge has no gradient; the rest is differentiable.
    """

    def __init__(
        self,
        r: int | None = None,
        ratio: float | None = None,
        num_prefix: int = 0,
        merge_queries: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if (r is None) == (ratio is None):
            raise ValueError("give one of r and ratio")
        if min(r or 0, num_prefix) < 0 or not 0 <= (ratio or 0) <= 1:
            raise ValueError(
                "r and num_prefix must be at least 0, and ratio between 0 and 1, got r = "
                f"{r}, num_prefix = {num_prefix}, ratio = {ratio}"
            )
        self.r, self.ratio = r, ratio
        self.num_prefix, self.merge_queries, self.scale = num_prefix, merge_queries, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention between merged tokens.

        Args:
            q: [B, Hq, L, D]. k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
            mask: bool [B | 1, N]; False is padding, which merges with nothing and is not attended
                to.
            causal: must be False, as a merged token stands at several places.

        Returns:
            [B, Hq, L, Dv]; 0 for queries that are padding, where queries merge.

        Raises:
            ValueError: causal; merge_queries with another number of queries than of keys.
        """
        if causal:
            raise ValueError(
                "a merged token stands for several places, of which causality would hide some: use "
                "TopKAttention or BlockSparseAttention"
            )
        tokens = k.shape[2]
        r = round((self.ratio or 0) * tokens) if self.r is None else self.r
        if r == 0:
            return biased_attention(q, k, v, scale=self.scale, mask=mask)[0]
        if self.merge_queries and q.shape[2] != tokens:
            raise ValueError(
                f"{q.shape[2]} queries cannot be merged as the {tokens} keys are: give "
                "merge_queries=False for cross-attention"
            )
        if mask is not None:
            mask = mask.expand(k.shape[0], tokens)
        metric = k.detach().mean(1)
        token_map = bipartite_soft_matching(metric, r, self.num_prefix, mask)
        slots = num_out(tokens, r, self.num_prefix)
        size = None if mask is None else mask.to(_size_dtype(k))
        k, sizes = _merge_heads(k, token_map, slots, size)
        v, _ = _merge_heads(v, token_map, slots, size)
        if self.merge_queries:
            q, _ = _merge_heads(q, token_map, slots, size)
        out = biased_attention(q, k, v, key_bias=sizes.log()[:, None], scale=self.scale)[0]
        if not self.merge_queries:
            return out
        return _in_heads(unmerge(_folded(out), token_map), out.shape[1])

    def extra_repr(self) -> str:
        amount = f"r={self.r}" if self.ratio is None else f"ratio={self.ratio}"
        return f"{amount}, num_prefix={self.num_prefix}, merge_queries={self.merge_queries}"


class PackedKVCore(nn.Module):
    """Pack keys and values into few bits, and attend to the packed ones as they are.

    For inference: packing has no gradient. With residual >= N nothing is packed, and the result is
    `biased_attention`'s, bit for bit.

    Args:
        bits, group_size, scheme, rotate: see `kv_pack`; in groups along the channels.
        residual: the last tokens, padding left aside, which stay in full precision.
        causal: query i sees the keys j <= i + N - L.
        scale: of the logits; 1 / sqrt(D) where None.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        scheme: str = "asymmetric",
        rotate: bool = False,
        residual: int = 0,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if residual < 0:
            raise ValueError(f"residual must be at least 0, got {residual}")
        self.bits, self.group_size = bits, group_size
        self.scheme, self.rotate = scheme, rotate
        self.residual, self.causal, self.scale = residual, causal, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention over packed keys and values.

        Args:
            q: [B, Hq, L, D]. k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv]; D and Dv
                multiples of group_size.
            mask: bool [B | 1, N]; False is padding.
            causal: as the option; either of them.

        Returns:
            [B, Hq, L, Dv]; 0 where a query sees no key.

        Raises:
            ValueError: an input requires grad, or what `kv_pack` refuses.
        """
        causal = causal or self.causal
        packed = k.shape[2] - self.residual
        if packed <= 0:
            return biased_attention(q, k, v, causal=causal, scale=self.scale, mask=mask)[0]
        if self.rotate and self.residual:
            raise ValueError("rotate needs residual = 0: the residual would not be rotated")
        if self.residual and mask is not None:
            k, v, mask, causal = _padding_first(k, v, mask, q.shape[2] if causal else 1)
        key, value = (
            kv_pack(x[:, :, :packed], self.bits, self.group_size, scheme=self.scheme,
                    rotate=self.rotate)
            for x in (k, v)
        )  # fmt: skip
        options: dict[str, Any] = {}
        if self.residual:
            options = {"residual_k": k[:, :, packed:], "residual_v": v[:, :, packed:]}
        return packed_attention(
            q, key, value, scale=self.scale, mask=mask, causal=causal, **options
        )[0]

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits}, group_size={self.group_size}, scheme={self.scheme}, "
            f"residual={self.residual}, causal={self.causal}"
        )


def _padding_first(
    k: Tensor, v: Tensor, mask: Tensor, queries: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """k, v and mask bool [B | 1, N] with each row's tokens behind its padding, in their order, for
    so many causal queries: these see by a mask [B, 1, L, N], as their keys moved."""
    mask = mask.expand(k.shape[0], k.shape[2])
    order = mask.byte().argsort(dim=1, stable=True)
    k, v = gather_tokens([k, v], order.to(torch.int32), [2, 2])
    mask = mask.gather(1, order)
    if queries > 1:
        last = torch.arange(order.shape[1] - queries, order.shape[1], device=k.device)
        mask = mask[:, None, None] & (order[:, None] <= last[:, None])[:, None]
    return k, v, mask, False


def _size_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _folded(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H * D]."""
    return x.transpose(1, 2).flatten(2)


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * D] as [B, H, N, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _merge_heads(
    x: Tensor, token_map: Tensor, slots: int, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [B, H, N, D] -> [B, H, slots, D], the means of the merged tokens, and their sizes."""
    merged, sizes = merge(_folded(x), token_map, slots, size)
    return _in_heads(merged, x.shape[1]), sizes
