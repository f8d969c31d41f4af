"""Quest: pages of keys, scored by an upper bound of the logits in them.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML 2024, arXiv 2406.10774).
"""

from __future__ import annotations

from torch import Tensor

import tokred
from tokred.selection import expand_blocks


def page_bounds(
    k: Tensor, page_size: int = 16, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is kept of every page.

    Args:
        k: [B, Hkv, N, D], rotated keys. mask: bool [B, N], False where a key is padding.

    Returns:
        bounds f32 [B, Hkv, ceil(N / page_size), 2, D], the elementwise least and greatest key, and
        counts i32 [B, pages]. A full page never changes, so a cache computes each once.
    """
    return tokred.block_pool(k, page_size, "min_max", mask=mask)


def quest_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_keys: int = 1024,
    page_size: int = 16,
    bounds: tuple[Tensor, Tensor] | None = None,
    reduce: str = "none",
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the num_keys // page_size pages of greatest bound sum_d max(q min, q max).

    Args:
        q: [B, Hq, 1, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        bounds: page_bounds(k, page_size, mask), where a cache keeps them.
        reduce: "none", each query head chooses for itself, as published for one key head a query
            head; "group_mean" or "group_max", one choice for the heads that share keys.
        mask: bool [B, N], False where a key is padding.

    Returns:
        out [B, Hq, 1, Dv], lse f32 [B, Hq, 1].
    """
    pooled, counts = page_bounds(k, page_size, mask) if bounds is None else bounds
    scores = tokred.block_score(q, pooled, counts, rule="bounds", reduce=reduce, scale=scale)
    pages = tokred.topk(scores, min(num_keys // page_size, scores.shape[-1]), order="position")[1]
    indices = expand_blocks(pages, page_size, k.shape[2])
    return tokred.sparse_attention(q, k, v, indices, scale=scale, mask=mask)
