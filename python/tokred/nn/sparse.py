"""Cores that attend to a part of the keys: those chosen, one by one or as blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import (
    biased_attention,
    block_pool,
    block_score,
    block_sparse_attention,
    qk_score,
    sparse_attention,
    topk_with_counts,
)
from ..ops.symbolic import known, smaller
from ..selection import block_mask, choose, ends, expand_blocks

__all__ = ["BlockSparseCore", "TopKCore"]

_REDUCTIONS = ("none", "group_mean", "group_max", "head_mean", "softmax_vote")
_UNKNOWN_LENGTHS = (
    "with a mask, a graph must know whether there are as many queries as keys, as the mask hides "
    "queries too then: use one size for both"
)
_RULES = {"mean": "dot", "sqrt_mean": "dot", "min_max": "bounds"}


class TopKCore(nn.Module):
    """Score the keys, choose k of them, attend to these: over a cache, or over N tokens.

    One list of keys serves `block_q` consecutive queries, chosen by their mean. Where everything
    would be chosen (num_sinks + k + num_locals >= N) the result is `biased_attention`'s, bit for
    bit.

    Args:
        k: keys chosen by score, beside the sinks and locals. With block scores, whole blocks are
            chosen, as many as hold k keys.
        scoring: "token", exact logits; "block", one score for block_size keys by their `statistic`;
            or int32 [Hq, F], the dimensions of q and k that the score reads for each head (FASA).
        reduce: over the heads, as in `qk_score`, which also decides who shares a list: "none", each
            query head has its own; "group_mean" and "group_max", the query heads of a key head do;
            "head_mean" and "softmax_vote", all heads do.
        num_sinks, num_locals: first and last keys, attended to in any case.
        block_size: keys of a block, with block scores.
        statistic: "mean"; "sqrt_mean"; or "min_max", the bounds of Quest (arXiv:2406.10774).
        block_q: queries that share a list; where None, all of them.
        causal: query i sees the keys j <= i + N - L.
        scale: of the logits and scores; 1 / sqrt(D) where None.

    Scores have no gradient; the attention to what was chosen is differentiable.
    """

    def __init__(
        self,
        k: int,
        scoring: str | Tensor = "token",
        reduce: str = "group_mean",
        num_sinks: int = 0,
        num_locals: int = 0,
        block_size: int = 64,
        statistic: str = "mean",
        block_q: int | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        dims = scoring if isinstance(scoring, Tensor) else None
        if dims is None and scoring not in ("token", "block"):
            raise ValueError(f"scoring must be 'token', 'block' or dimensions, got {scoring!r}")
        if reduce not in _REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(_REDUCTIONS)}, got {reduce!r}")
        if statistic not in _RULES:
            raise ValueError(f"statistic must be one of {', '.join(_RULES)}, got {statistic!r}")
        if min(k, num_sinks, num_locals) < 0:
            raise ValueError("k, num_sinks and num_locals must be at least 0")
        if block_size < 1 or (block_q is not None and block_q < 1):
            raise ValueError("block_size and block_q must be at least 1")
        self.k, self.num_sinks, self.num_locals = k, num_sinks, num_locals
        self.scoring = "dims" if dims is not None else scoring
        self.reduce, self.statistic = reduce, statistic
        self.block_size, self.block_q = block_size, block_q
        self.causal, self.scale = causal, scale
        self.dims: Tensor | None
        # An option, not a weight: a state_dict without it loads strictly.
        self.register_buffer("dims", dims, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention over the chosen keys.

        Args:
            q: [B, Hq, L, D]. k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
            mask: bool [B | 1, N]; False is padding, on either side, of the queries too if L = N.
            causal: as the option; either of them.

        Returns:
            [B, Hq, L, Dv]; 0 where a query sees no key.
        """
        causal = causal or self.causal
        queries, keys = q.shape[2], k.shape[2]
        everything = self.num_sinks + self.k + self.num_locals >= keys
        if known(queries == 0) or known(everything):
            return biased_attention(q, k, v, causal=causal, scale=self.scale, mask=mask)[0]
        block_q = queries if self.block_q is None else smaller(self.block_q, queries)
        lengths = _visible_keys(q, keys, block_q) if causal else None
        if self.scoring == "block":
            indices = self._choose_blocks(q.detach(), k.detach(), block_q, mask, lengths)
        else:
            scores = self._scores(q.detach(), k.detach(), block_q, mask)
            visible = None if mask is None else mask[:, None, None]
            indices, _ = choose(scores, self.k, self.num_sinks, self.num_locals, visible, lengths)
        return sparse_attention(
            q, k, v, indices, scale=self.scale, causal=causal, mask=mask, block_q=block_q
        )[0]

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, scoring={self.scoring}, reduce={self.reduce}, "
            f"num_sinks={self.num_sinks}, num_locals={self.num_locals}, causal={self.causal}"
        )

    def _scores(self, q: Tensor, k: Tensor, block_q: int, mask: Tensor | None) -> Tensor:
        """f32 [B, H', lists, N], -inf where masked."""
        if known(block_q == q.shape[2]):
            if mask is not None and not known(block_q <= 1):
                q = _mean_queries(q, k, block_q, mask).to(q.dtype)
            scores = qk_score(q, k, self.reduce, self.dims, self.scale, mask=mask)[:, :, None]
        elif self.scoring == "dims":
            raise ValueError("scoring by dimensions makes one list: leave block_q at None")
        else:
            means = _mean_queries(q, k, block_q, mask)
            # Every key is a block of its own.
            counts = None if mask is None else mask.to(torch.int32)
            scores = block_score(
                means, k[:, :, :, None], counts, reduce=self.reduce, scale=self.scale
            )
        if mask is not None and self.reduce == "softmax_vote":
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return scores

    def _choose_blocks(
        self, q: Tensor, k: Tensor, block_q: int, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """indices i32 [B, H', lists, K]: the keys of the chosen blocks."""
        size, keys = self.block_size, k.shape[2]
        pooled, counts = block_pool(k, size, self.statistic, mask=mask)
        means = _mean_queries(q, k, block_q, mask)
        rule = _RULES[self.statistic]
        scores = block_score(means, pooled, counts, rule, self.reduce, self.scale)
        scores = scores.masked_fill((counts <= 0)[:, None, None], -torch.inf)
        visible = torch.ones(1, keys, dtype=torch.bool, device=k.device) if mask is None else mask
        visible = visible[:, None, None]
        if lengths is not None:
            visible = visible & (torch.arange(keys, device=k.device) < lengths[..., None])
            scores = scores.masked_fill(~_any_per_block(visible, size), -torch.inf)
        forced = _any_per_block(ends(visible, self.num_sinks, self.num_locals), size)
        # Sinks and locals may begin in the middle of a block.
        most = sum(-(-n // size) + 1 for n in (self.num_sinks, self.num_locals) if n)
        places = smaller(-(-self.k // size) + most, pooled.shape[2])
        _, blocks, _ = topk_with_counts(scores, places, order="position", must_keep=forced)
        return expand_blocks(blocks, size, keys)


class BlockSparseCore(nn.Module):
    """Score blocks of keys for blocks of queries, keep the best, and attend inside them.

    Args:
        k: blocks kept by score for each block of queries; or
        density: the share of the blocks kept by score; or
        top_p: as few blocks as it takes for the softmax of the block scores to exceed it, but at
            least min_k, as in Rectified SpaAttn (arXiv:2511.19835). One of the three.
        min_k: see top_p.
        block_q, block_k: queries and keys of a block.
        statistic: of the keys of a block, as in `TopKCore`; queries are averaged.
        reduce: "none", each query head has its own mask; "group_mean", "group_max" and "head_mean",
            heads share it.
        num_sinks, num_locals: first keys, and keys before each query block's own, whose blocks are
            kept beside those. With causal the own blocks are kept in any case.
        causal: query i sees the keys j <= i + N - L; blocks in the future are not chosen.
        scale: of the logits and scores; 1 / sqrt(D) where None.

    Scores have no gradient; the attention inside the kept blocks is differentiable.
    """

    def __init__(
        self,
        k: int | None = None,
        density: float | None = None,
        top_p: float | None = None,
        min_k: int = 1,
        block_q: int = 64,
        block_k: int = 64,
        statistic: str = "mean",
        reduce: str = "none",
        num_sinks: int = 0,
        num_locals: int = 0,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if sum(option is not None for option in (k, density, top_p)) != 1:
            raise ValueError("give one of k, density and top_p")
        if density is not None and not 0 <= density <= 1:
            raise ValueError(f"density must be between 0 and 1, got {density}")
        if reduce not in _REDUCTIONS[:-1]:
            raise ValueError(f"reduce must be one of {_REDUCTIONS[:-1]}, got {reduce!r}")
        if statistic not in _RULES:
            raise ValueError(f"statistic must be one of {', '.join(_RULES)}, got {statistic!r}")
        if min(block_q, block_k) < 1 or min(num_sinks, num_locals, min_k, k or 0) < 0:
            raise ValueError("block sizes must be at least 1, and counts at least 0")
        self.k, self.density, self.top_p, self.min_k = k, density, top_p, min_k
        self.block_q, self.block_k = block_q, block_k
        self.statistic, self.reduce = statistic, reduce
        self.num_sinks, self.num_locals = num_sinks, num_locals
        self.causal, self.scale = causal, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attention inside the kept blocks.

        Args:
            q: [B, Hq, L, D]. k: [B, Hkv, N, D], Hq a multiple of Hkv. v: [B, Hkv, N, Dv].
            mask: bool [B | 1, N]; False is padding, on either side, of the queries too if L = N.
            causal: as the option; either of them.

        Returns:
            [B, Hq, L, Dv]; 0 where a query sees no key.
        """
        causal = causal or self.causal
        blocks = self.block_mask(q, k, mask, causal)
        return block_sparse_attention(
            q, k, v, blocks, self.block_q, self.block_k, causal, self.scale, mask=mask
        )[0]

    def block_mask(
        self, q: Tensor, k: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """The blocks that forward keeps: bool [B, Hq | 1, ceil(L / block_q), ceil(N / block_k)]."""
        q, k = q.detach(), k.detach()
        pooled, counts = block_pool(k, self.block_k, self.statistic, mask=mask)
        means = _mean_queries(q, k, self.block_q, mask)
        rule = _RULES[self.statistic]
        scores = block_score(means, pooled, counts, rule, self.reduce, self.scale)
        visible, forced = self._visible_and_forced(q, k.shape[2], mask, causal or self.causal)
        scores = scores.masked_fill(~visible, -torch.inf)
        blocks = self._kept(scores, forced)
        if blocks.shape[1] not in (1, q.shape[1]):
            blocks = blocks.repeat_interleave(q.shape[1] // blocks.shape[1], 1)
        return blocks

    def extra_repr(self) -> str:
        amount = {"k": self.k, "density": self.density, "top_p": self.top_p}
        given = ", ".join(f"{name}={value}" for name, value in amount.items() if value is not None)
        return f"{given}, block_q={self.block_q}, block_k={self.block_k}, causal={self.causal}"

    def _visible_and_forced(
        self, q: Tensor, keys: int, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """bool [B | 1, 1, nQ | 1, nK]: blocks that may be kept, and blocks that must be."""
        place = torch.arange(keys, device=q.device)
        visible = torch.ones(1, keys, dtype=torch.bool, device=q.device) if mask is None else mask
        visible = visible[:, None, None]
        if not causal:
            forced = ends(visible, self.num_sinks, self.num_locals)
            return _any_per_block(visible, self.block_k), _any_per_block(forced, self.block_k)
        last = _visible_keys(q, keys, self.block_q)[..., None]
        first = torch.arange(last.shape[2], device=q.device)[:, None] * self.block_q
        own = place >= first + (keys - q.shape[2]) - self.num_locals
        seen = visible & (place < last)
        forced = (seen & own) | ends(seen, self.num_sinks, 0)
        return _any_per_block(seen, self.block_k), _any_per_block(forced, self.block_k)

    def _kept(self, scores: Tensor, forced: Tensor) -> Tensor:
        """bool of the shape of scores: the forced blocks and the best of the others."""
        total = scores.shape[-1]
        if self.top_p is not None:
            shares = scores.softmax(-1).nan_to_num(0)
            shares = shares.masked_fill(scores == -torch.inf, -torch.inf)
            _, chosen, _ = topk_with_counts(shares, total, top_p=self.top_p, min_k=self.min_k)
        else:
            k = round((self.density or 0.0) * total) if self.k is None else self.k
            free = scores.masked_fill(forced, -torch.inf)
            _, chosen, _ = topk_with_counts(free, smaller(k, total))
        return block_mask(chosen, total) | forced


def _mean_queries(q: Tensor, k: Tensor, block_q: int, mask: Tensor | None) -> Tensor:
    """f32 [B, Hq, ceil(L / block_q), D]: the means of block_q queries, padding left out.

    The mask is of the keys; where there are as many queries, these are the same tokens.
    """
    own = mask if mask is not None and known(q.shape[2] == k.shape[2]) else None
    if mask is not None and own is None:
        torch._check(q.shape[2] != k.shape[2], lambda: _UNKNOWN_LENGTHS)
    return block_pool(q, block_q, mask=own)[0][:, :, :, 0]


def _visible_keys(q: Tensor, keys: int, block_q: int) -> Tensor:
    """int32 [1, 1, ceil(L / block_q)]: the keys that each block's last query sees, causally."""
    queries = q.shape[2]
    blocks = (queries + block_q - 1) // block_q
    last = (torch.arange(1, blocks + 1, device=q.device) * block_q).clamp(max=queries)
    return (last + (keys - queries)).clamp(min=0).to(torch.int32)[None, None]


def _any_per_block(tokens: Tensor, size: int) -> Tensor:
    """bool [.., N] -> [.., ceil(N / size)]: whether any token of a block is True."""
    missing = -tokens.shape[-1] % size
    return nn.functional.pad(tokens, (0, missing)).unflatten(-1, (-1, size)).any(-1)
