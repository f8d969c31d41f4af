"""Quest: pages of keys, scored by an upper bound of the logits in them.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML 2024, arXiv 2406.10774).

The newest page is always kept, and the others compete for the rest of the budget, which is what the
published kernels do. The published evaluation differs from them: there the newest page competes
like any other, and at least three pages are kept. Both leave the first two layers dense, which is
up to the caller.
"""

from __future__ import annotations

from torch import Tensor

import tokred
from tokred.selection import ends, expand_blocks

from ._lists import check_minimum
from ._method import Family, Method, Needs


def page_bounds(
    k: Tensor, page_size: int = 16, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What is kept of every page.

    Args:
        k: [B, Hkv, N, D], rotated keys. page_size: at least 1; the last page may be shorter.
        mask: bool [B, N], False where a key is padding, which takes no part in the bounds.

    Returns:
        bounds f32 [B, Hkv, ceil(N / page_size), 2, D], the elementwise minimum and maximum key, and
        counts i32 [B, pages]. A full page never changes, so a cache computes each once.
    """
    check_minimum(1, page_size=page_size)
    return tokred.block_pool(k.detach(), page_size, "min_max", mask=mask)


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
    """Attention to the newest page and to those of largest bound sum_d max(q min, q max).

    Args:
        q: [B, Hq, 1, D]; k: [B, Hkv, N, D]; v: [B, Hkv, N, Dv].
        num_keys: the budget, at least 1. num_keys // page_size pages are attended to, the newest
            among them, and never fewer than that one. The newest page is the last that holds a key
            which is no padding, full or not.
        bounds: page_bounds(k, page_size, mask), where a cache keeps them.
        reduce: "none", each query head chooses for itself, as published for one key head a query
            head; "group_mean" or "group_max", one choice for the heads that share keys.
        mask: bool [B, N], False where a key is padding.

    Returns:
        out [B, Hq, 1, Dv], lse f32 [B, Hq, 1]; 0 and -inf for a row that is all padding.
        Differentiable, the choice itself aside.

    Raises:
        ValueError: num_keys or page_size below 1.
    """
    check_minimum(1, num_keys=num_keys, page_size=page_size)
    pooled, counts = page_bounds(k, page_size, mask) if bounds is None else bounds
    options = {"rule": "bounds", "reduce": reduce, "scale": scale}
    scores = tokred.block_score(q.detach(), pooled, counts, **options)
    newest = ends(counts > 0, 0, 1)[:, None, None]
    budget = min(max(num_keys // page_size, 1), scores.shape[-1])
    pages = tokred.topk(scores, budget, order="position", must_keep=newest)[1]
    indices = expand_blocks(pages, page_size, k.shape[2])
    return tokred.sparse_attention(q, k, v, indices, scale=scale, mask=mask)


METHOD = Method(
    title="Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arxiv="2406.10774",
    family=Family.DECODE,
    needs=(Needs.LANGUAGE_MODEL,),
    status="exact",
    summary="keep the newest page of keys and those with the largest upper bound of their logits",
)
